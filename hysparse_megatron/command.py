"""What all commands share: a parser, how errors and Ctrl-C end them. Imports no torch."""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Protocol

from hysparse_megatron.architecture.bounds import LARGEST
from hysparse_megatron.errors import ConfigError, HySparseError, RankFailure, did_you_mean
from hysparse_megatron.runtime.launcher import rank_from_environment
from hysparse_megatron.runtime.output import end_of_output, outlast_readers

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 + SIGINT, as shells report it."""


class Main(Protocol):
    """A command: takes its line without the program's name, returns its exit code."""

    def __call__(self, argv: Sequence[str] | None = None) -> int:
        """`argv` is the command line without the program's name."""


def command(main: Callable[[Sequence[str]], int], is_run: bool = False) -> Main:
    """Let `main` end with the exit code of an error of `errors`, after saying it in one line.

    An error all ranks share is told by the first; who lost another rank cannot know who else tells.
    Without arguments it runs as this process, with its command line. It goes on when nobody reads
    its output any more; a run also when that cannot be written: it keeps its own records.
    """

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        if argv is None:
            outlast_readers(whatever=is_run)
            expect_interrupt()
            try:
                return end_of_output(guarded(sys.argv[1:]))
            except OSError as error:
                return end_of_output(error)
        return guarded(argv)

    def guarded(argv: Sequence[str]) -> int:
        try:
            return main(argv)
        except HySparseError as error:
            if is_first_rank() or isinstance(error, RankFailure):
                print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            return error.exit_code

    return run


def is_first_rank() -> bool:
    """Whether this is rank 0, or a process alone, or one whose launcher has left it unclear."""
    try:
        return rank_from_environment().rank == 0
    except ConfigError:
        return True


def expect_interrupt() -> None:
    """From now on Ctrl-C ends this process in one line with code 130; what is open is closed.

    Call it before the slow imports. Other exceptions are shown as before.
    """
    before = sys.excepthook

    def hook(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> object:
        if not issubclass(kind, KeyboardInterrupt):
            return before(kind, error, trace)
        if is_first_rank():
            print("interrupted", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        # Not sys.exit: threads that are still at work would be waited for.
        os._exit(INTERRUPTED)

    sys.excepthook = hook
    # A launcher keeps it from its ranks until now; worker processes are never to see it.
    if multiprocessing.current_process().name == "MainProcess":
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def make_parser(program: str, description: str | None) -> CommandParser:
    """The parser of a command, such as `hysparse plan`, with the docstring that its help shows."""
    return CommandParser(
        prog=program,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=description,
        allow_abbrev=False,
    )


def hysparse() -> str:
    """What to type here for the command `hysparse` of this environment: never what is not there."""
    python = Path(sys.executable)
    script = python.with_name("hysparse")
    if not script.is_file():
        return f"{_from_here(python)} -m hysparse_megatron.main"
    return "hysparse" if shutil.which("hysparse") == str(script) else _from_here(script)


def _from_here(path: Path) -> str:
    here = Path.cwd()
    return shlex.quote(str(path.relative_to(here) if path.is_relative_to(here) else path))


def import_paths() -> str:
    """PYTHONPATH of a child process that is to find the packages of this one, wherever it runs."""
    specs = [find_spec(name) for name in ("hysparse_megatron", "hysparse_kernels")]
    roots = [str(Path(spec.origin).parents[1]) for spec in specs if spec and spec.origin]
    return os.pathsep.join([*roots, *filter(None, [os.environ.get("PYTHONPATH")])])


class CommandParser(argparse.ArgumentParser):
    """Reports a wrong option like any other bad setting, with the nearest one there is."""

    no_option: Callable[[str], list[str]] = staticmethod(lambda word: [])
    """What may be meant, besides options of this parser, by a word with dashes in front."""

    def error(self, message: str) -> NoReturn:
        """Raises ConfigError."""
        raise ConfigError(f"{message}{did_you_mean(self._meant(message))} (see --help)")

    def _meant(self, message: str) -> list[str]:
        if unknown := re.fullmatch(r"unrecognized arguments: (.*)", message):
            words = [word for word in unknown[1].split() if word[0] == "-"]
            close = _close([word.partition("=")[0] for word in words], set(_options(self)))
            return close or [meant for word in words for meant in self.no_option(word)]
        if wrong := re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message):
            return _close([wrong[1]], re.findall(r"[^\s',]+", wrong[2]))
        return []


def _options(parser: argparse.ArgumentParser) -> Iterator[str]:
    """All options of a parser and of its commands."""
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                yield from _options(sub)


def _close(words: Sequence[str], known: Iterable[str]) -> list[str]:
    names = sorted(known)
    return [found for word in words for found in get_close_matches(word, names, 1, cutoff=0.75)]


def number(text: str, is_allowed: Callable[[float], bool], allowed: str) -> float:
    """One that is allowed, for types of options. Raises argparse.ArgumentTypeError."""
    try:
        found = float(text)
    except ValueError:
        found = float("nan")
    if not is_allowed(found):  # nothing holds of NaN
        raise argparse.ArgumentTypeError(f"got {text}; allowed {allowed}")
    return found


def given(text: str) -> str:
    """A name that is not empty, as the type of an option. Raises argparse.ArgumentTypeError."""
    if not text:
        raise argparse.ArgumentTypeError("is empty; give a name, or check the shell's variables")
    return text


def positive(text: str) -> int:
    """A whole number from 1, as the type of an option. Raises argparse.ArgumentTypeError."""
    digits = text.lstrip("0")
    if not text.isdecimal() or not digits:
        raise argparse.ArgumentTypeError(f"got {text}; allowed a whole number from 1")
    if len(digits) > len(str(LARGEST)) or int(digits) > LARGEST:
        raise argparse.ArgumentTypeError(f"got {text}; allowed at most {LARGEST}")
    return int(digits)
