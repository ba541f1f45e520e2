"""Continue text with the model of a run: `hysparse generate --run-dir RUN --prompt TEXT`.

    hysparse generate --run-dir runs/quickstart --prompt "def main(" --max-new-tokens 64
    hysparse generate --run-dir runs/quickstart --prompts-file prompts.txt --temperature 0.8
    torchrun --nproc-per-node 2 -m hysparse_megatron.main generate --run-dir RUN --prompt "class "

Loads any checkpoint of the run, whatever parallel sizes saved it, into this process, or split over
the ranks of torchrun (tensor parallel). New text goes to standard output as it is made; several
prompts are continued together and shown one after another; without one a document is begun. Speed
and the bytes of the key-value cache go to standard error. Ends with 0, with 2 for settings that
cannot be, with 5 if the tokenizer is not there or another one, with 6 if there is no valid
checkpoint.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hysparse_megatron.command import command, make_parser, number, positive
from hysparse_megatron.config.frozen import CONFIG_FILE
from hysparse_megatron.errors import ConfigError, DataError
from hysparse_megatron.runtime.launcher import Rank, rank_from_environment
from hysparse_megatron.runtime.quiet import quiet_libraries

from .trained_run import add_run_options, tokenizer_of

if TYPE_CHECKING:
    from hysparse_megatron.data.tokenizer import Encoder
    from hysparse_megatron.inference.generate import Settings
    from hysparse_megatron.inference.load import LoadedModel


@command
def main(argv: Sequence[str]) -> int:
    """Generate as `argv` says, the command line without the program's name."""
    args = _parser().parse_args(list(argv))
    rank = rank_from_environment()
    prompts = _prompts(args)
    _require_run(args.run_dir)
    # Imported late: a wrong command must fail before seconds of imports.
    quiet_libraries()
    _run(args, prompts, rank)
    return 0


def _run(args: argparse.Namespace, prompts: Sequence[str], rank: Rank) -> None:
    from hysparse_megatron.inference.load import inference_config, loaded_run

    config = inference_config(args.run_dir, rank.world_size)
    verify = not args.no_verify
    with loaded_run(rank, config, args.run_dir, args.checkpoint, verify) as loaded:
        _generate(args, loaded, prompts, is_first=rank.rank == 0)


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("hysparse generate", __doc__)
    add_run_options(parser)
    add = parser.add_argument
    add(
        "--prompt", action="append", default=[], metavar="TEXT", help="text to continue; repeatable"
    )
    add("--prompts-file", type=Path, metavar="FILE", help="one prompt a line, beside --prompt")
    add(
        "--max-new-tokens",
        type=positive,
        default=128,
        metavar="N",
        help="tokens to add to each prompt, at most (default %(default)s)",
    )
    add(
        "--temperature",
        type=_temperature,
        default=0.0,
        metavar="T",
        help="divides logits before the draw; 0 takes the most likely token (default)",
    )
    add(
        "--top-p",
        type=_share,
        default=1.0,
        metavar="P",
        help="draw among the fewest tokens with this probability in sum (default 1: all)",
    )
    add("--seed", type=int, default=0, metavar="N", help="of the draws (default 0)")
    add("--stop", action="append", default=[], metavar="TEXT", help="ends a text; repeatable")
    add("--ignore-end", action="store_true", help="go on after the end of a document")
    add(
        "--cache-dtype",
        choices=("model", "bf16", "fp8"),
        default="model",
        help="of the full layers' keys and values (default: as the model computes)",
    )
    add(
        "--prefill-chunk",
        type=positive,
        default=4096,
        metavar="N",
        help="tokens of prompts taken in at a time (default %(default)s)",
    )
    add("--no-verify", action="store_true", help="do not compare the checkpoint with its hashes")
    return parser


def _temperature(text: str) -> float:
    return number(text, lambda found: 0 <= found < float("inf"), "a number from 0")


def _share(text: str) -> float:
    return number(text, lambda found: 0 < found <= 1, "a number above 0 and at most 1")


def _prompts(args: argparse.Namespace) -> list[str]:
    """Those that are given, else an empty one.

    Raises ConfigError if the file cannot be read, or for texts and settings that cannot be meant.
    """
    prompts = list(args.prompt)
    for option, texts in (("--prompt", prompts), ("--stop", args.stop)):
        for text in texts:
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise ConfigError(f"{option}: got {text!r}; allowed text in UTF-8")
    if args.prompts_file is not None:
        try:
            text = args.prompts_file.read_text(encoding="utf-8-sig")
            # Not `splitlines`, for which a form feed and others within a line end it too.
            prompts += text.removesuffix("\n").split("\n") if text else []
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"--prompts-file: cannot read {args.prompts_file}: {error}"
            ) from error
        if not prompts:
            raise ConfigError(f"--prompts-file: {args.prompts_file} has no line to continue")
    if "" in args.stop:
        raise ConfigError("--stop: got an empty text, which would end everything at once")
    if args.top_p < 1 and args.temperature == 0:
        raise ConfigError("--top-p: nothing is drawn at --temperature 0; give one above 0")
    return prompts or [""]


def _require_run(run_dir: Path) -> None:
    if not (run_dir / CONFIG_FILE).is_file():
        raise ConfigError(f"--run-dir: {run_dir} is no run directory: no {CONFIG_FILE} in it")


def _generate(
    args: argparse.Namespace, loaded: LoadedModel, prompts: Sequence[str], is_first: bool
) -> None:
    from hysparse_megatron.inference.generate import CacheDtype, Settings, generate
    from hysparse_megatron.inference.report import report
    from hysparse_megatron.inference.sampling import Sampling
    from hysparse_megatron.runtime.agreement import on_every_rank

    tokenizer = on_every_rank(lambda: tokenizer_of(args, loaded), os_error=DataError)
    # Where documents begin with no token, an empty prompt starts one as what follows another's end.
    ids = [tokenizer.encode_prompt(prompt) or [tokenizer.end_of_document] for prompt in prompts]
    settings = Settings(
        max_new_tokens=args.max_new_tokens,
        sampling=Sampling(args.temperature, args.top_p, args.seed),
        stop_tokens=frozenset() if args.ignore_end else frozenset({tokenizer.end_of_document}),
        holes=tokenizer.holes,
        prefill_chunk=args.prefill_chunk,
        cache_dtype=CacheDtype(args.cache_dtype),
    )
    longest, trained = max(map(len, ids)) + args.max_new_tokens, loaded.config.train.seq_length
    if is_first and longest > trained:
        print(
            f"WARNING: up to {longest:,} tokens, but the model was trained on sequences of "
            f"{trained:,}: it has not seen such distances",
            file=sys.stderr,
        )
    printer = _Printer(prompts, tokenizer, settings, args.stop, is_silent=not is_first)
    generated = generate(loaded, ids, settings, printer.take)
    printer.finish()
    text = report(loaded, generated, settings)  # adds up over all ranks
    if is_first:
        print(text, file=sys.stderr)


class _Printer:
    """Shows the first text as it is made, and the others in turn once those before are done."""

    def __init__(
        self,
        prompts: Sequence[str],
        tokenizer: Encoder,
        settings: Settings,
        stops: Sequence[str],
        is_silent: bool,
    ) -> None:
        from hysparse_megatron.inference.text_stream import TextStream

        self._prompts = prompts
        self._streams = [TextStream(tokenizer.decode, stops) for _ in prompts]
        self._lengths = [0] * len(prompts)
        self._settings = settings
        self._is_done = [False] * len(prompts)
        self._waiting = [""] * len(prompts)
        self._current = -1
        self._is_silent = is_silent
        self._turn_page()

    def take(self, number: int, token: int) -> bool:
        """The next token of a prompt; whether a stop string has come."""
        stream = self._streams[number]
        self._lengths[number] += 1
        is_end = token in self._settings.stop_tokens
        text = "" if is_end else stream.push(token)
        if is_end or stream.stopped or self._lengths[number] == self._settings.max_new_tokens:
            text += stream.finish()
            self._is_done[number] = True
        self._waiting[number] += text
        while self._current < len(self._prompts):
            self._write(self._waiting[self._current])
            self._waiting[self._current] = ""
            if not self._is_done[self._current]:
                break
            self._turn_page()
        return stream.stopped

    def finish(self) -> None:
        """Nothing is left to show: every text has come to its end."""
        assert all(self._is_done)

    def _turn_page(self) -> None:
        """End the text that is shown and begin the next one."""
        if self._current >= 0:
            self._write("\n")
        self._current += 1
        if len(self._prompts) > 1 and self._current < len(self._prompts):
            self._write(f"== prompt {self._current + 1}: {self._prompts[self._current]!r}\n")

    def _write(self, text: str) -> None:
        if not self._is_silent:
            print(text, end="", flush=True)


if __name__ == "__main__":
    sys.exit(main())
