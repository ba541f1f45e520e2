"""Completion for bash: `eval "$(hysparse completion bash)"` in ~/.bashrc.

Completes commands, their options and actions, config groups and their presets. zsh takes it after
`autoload -U bashcompinit && bashcompinit`.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import sys
from collections.abc import Sequence

from hysparse_megatron.command import command, make_parser
from hysparse_megatron.config.compose import GROUPS, group_options
from hysparse_megatron.main import COMMANDS

BASH = """\
_hysparse() {
  local word=${COMP_WORDS[COMP_CWORD]}
  [[ $word == = ]] && word=
  COMPREPLY=($(compgen -W "$("$1" completion words -- "${COMP_WORDS[@]:1:COMP_CWORD}" \
    2> /dev/null)" -- "$word"))
  [[ ${#COMPREPLY[@]} == 1 && $COMPREPLY == *= ]] && compopt -o nospace
}
complete -o default -F _hysparse hysparse
"""
_TAKES_SETTINGS = ("train", "launch", "submit", "preflight", "plan")


@command
def main(argv: Sequence[str]) -> int:
    """Print the script, or for it what may stand at the end of a command line."""
    parser = make_parser("hysparse completion", __doc__)
    parser.add_argument("what", choices=("bash", "words"), help="the script; or what it asks for")
    parser.add_argument("line", nargs="*", help="the words so far, the unfinished one included")
    args = parser.parse_args(list(argv))
    print(BASH if args.what == "bash" else "\n".join(candidates(args.line)), end="")
    return 0


def candidates(line: Sequence[str]) -> list[str]:
    """What may stand in place of the last of `line`, the words after `hysparse`."""
    before = list(line[:-1])
    if line[-1:] == ["="] or before[-1:] == ["="]:  # bash takes = for a word of its own
        group = line[-2] if line[-1] == "=" else line[-3]
        return group_options(group) if group in GROUPS else []
    name = next((name for n in (2, 1) if (name := " ".join(before[:n])) in COMMANDS), None)
    if name is None:
        started = [name.split() for name in COMMANDS]
        return sorted({words[len(before)] for words in started if words[: len(before)] == before})
    found = _of_the_help(name, before[len(name.split()) :])
    return found + [f"{group}=" for group in GROUPS if name in _TAKES_SETTINGS]


def _of_the_help(name: str, after: Sequence[str]) -> list[str]:
    """Options and actions that the help of a command, or of its action in `after`, shows."""
    main = importlib.import_module(f"hysparse_megatron.{COMMANDS[name][0]}").main
    text = io.StringIO()
    action = [word for word in after if re.fullmatch(r"[a-z]+", word)][:1]
    for words in ([*action, "--help"], ["--help"]):
        with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
            main(words)
        if text.getvalue():
            break
    options = re.findall(r"^  (?:-\w(?: \w+)?, )?(--[a-z][a-z-]+)", text.getvalue(), flags=re.M)
    return options + re.findall(r"^    ([a-z]+)  ", text.getvalue(), flags=re.M)


if __name__ == "__main__":
    sys.exit(main())
