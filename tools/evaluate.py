"""How good a run's model is: `hysparse evaluate --run-dir RUN [--tasks ...]`.

    hysparse evaluate --run-dir runs/quickstart
    hysparse evaluate --run-dir runs/long --tasks needle multi_key --lengths 4096 32768
    torchrun --nproc-per-node 2 -m hysparse_megatron.main evaluate --run-dir runs/long

Tasks:
    loss               held-out cross-entropy and perplexity, also by position in the sequence: on
                       the same samples as the run's own evaluations, unless told otherwise
    needle, multi_key, multi_needle, variable_tracking, word_count
                       questions made on the spot whose answers stand in a long text, in the manner
                       of RULER; the score is the share of the answers in a greedy continuation
    all                every one of them

Loads any checkpoint of the run, whatever parallel sizes saved it, into this process or split over
the ranks of torchrun (tensor parallel). For lm-evaluation-harness export the model first, with
hysparse convert. Ends with 0, with 2 for settings that cannot be, with 5 if data or tokenizer are
not there, with 6 if there is no valid checkpoint.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hysparse_megatron.command import command, given, make_parser, positive
from hysparse_megatron.config.schema import TrainConfig
from hysparse_megatron.evaluation.progress import Progress
from hysparse_megatron.evaluation.scores import Score, ask, require_room
from hysparse_megatron.evaluation.tasks import TASKS
from hysparse_megatron.files import require_writable, writing
from hysparse_megatron.runtime.launcher import rank_from_environment
from hysparse_megatron.runtime.quiet import quiet_libraries

from .trained_run import add_run_options, tokenizer_of

if TYPE_CHECKING:
    from hysparse_megatron.evaluation.positions import Bin
    from hysparse_megatron.inference.load import LoadedModel

LOSS = "loss"


@command
def main(argv: Sequence[str]) -> int:
    """Evaluate as `argv` says, the command line without the program's name."""
    args = _parse(argv)
    rank = rank_from_environment()
    require_writable(args.json, "--json")
    # Imported late: a wrong command must fail before seconds of imports.
    quiet_libraries()
    from hysparse_megatron.inference.load import inference_config, loaded_run

    config = inference_config(args.run_dir, rank.world_size)
    with loaded_run(rank, config, args.run_dir, args.checkpoint) as loaded:
        results = _evaluate(args, loaded, is_first=rank.rank == 0)
    if rank.rank == 0 and args.json is not None:
        with writing(args.json, "--json"):
            args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


_OF_LOSS = {"data": None, "sequences": None, "bins": 8}
_OF_QUESTIONS = {"samples": 20, "seed": 0}
"""Options that only one kind of task reads, and their defaults."""


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options, with `tasks` resolved; one that no task reads is a wrong command."""
    parser = _parser()
    args = parser.parse_args(list(argv))
    args.tasks = [LOSS, *TASKS] if "all" in args.tasks else list(dict.fromkeys(args.tasks))
    kinds = ((_OF_LOSS, LOSS in args.tasks, LOSS), (_OF_QUESTIONS, args.tasks != [LOSS], "all"))
    for defaults, asked, needed in kinds:
        for name, default in defaults.items():
            given = getattr(args, name)
            if given is not None and not asked:
                parser.error(f"--{name} changes nothing of {', '.join(args.tasks)}:"
                             f" leave it out, or add {needed} to --tasks")  # fmt: skip
            setattr(args, name, default if given is None else given)
    return args


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("hysparse evaluate", __doc__)
    add_run_options(parser)
    add = parser.add_argument
    add(
        "--tasks",
        nargs="+",
        choices=("all", LOSS, *TASKS),
        default=[LOSS],
        metavar="TASK",
        help="see above (default: loss)",
    )
    add(
        "--lengths",
        nargs="+",
        type=positive,
        metavar="N",
        help="tokens of a question or held-out sequence (default: the run's train.seq_length)",
    )
    add("--samples", type=positive, metavar="N", help="questions a task and length (default 20)")
    add(
        "--sequences",
        type=positive,
        metavar="N",
        help="held-out ones, at most (default: as many as the run's own evaluations)",
    )
    add("--bins", type=positive, metavar="N", help="of positions, for the loss (default 8)")
    add("--batch-size", type=positive, default=8, metavar="N", help="sequences at a time")
    add("--seed", type=int, metavar="N", help="of the questions (default 0)")
    add(
        "--data",
        type=given,
        metavar="PATH",
        help="text (many documents: a share is held out) or prepared dataset, instead of the run's",
    )
    add("--json", type=Path, metavar="FILE", help="also write all numbers there")
    return parser


def _evaluate(args: argparse.Namespace, loaded: LoadedModel, is_first: bool) -> dict[str, Any]:
    """All tasks at all lengths, printed on the first rank as they come."""
    names = args.tasks
    trained = loaded.config.train.seq_length
    lengths = args.lengths or [trained]

    def log(text: str) -> None:
        if is_first:
            print(text, flush=True)

    log(f"{loaded.checkpoint}")
    for length in lengths:
        if length > trained:
            log(f"note: {length:,} tokens, but the model was trained on {trained:,} at a time")
    results: dict[str, Any] = {"checkpoint": str(loaded.checkpoint), "seed": args.seed}
    if LOSS in names:
        results[LOSS] = []
        for length in lengths:
            notes = list(_differences(args, loaded, length))
            whole, bins, sequences = _loss(args, loaded, length, notes.append, not is_first)
            log(_loss_table(length, sequences, whole, bins))
            for note in notes:
                log(f"  note: {note}")
            rows = [dataclasses.asdict(one) for one in (whole, *bins)]
            results[LOSS].append(
                {"length": length, "sequences": sequences, "all": rows[0], "bins": rows[1:]}
            )
    asked = [name for name in names if name != LOSS]
    if asked:
        scores = []
        for score in _scores(args, loaded, asked, lengths, is_quiet=not is_first):
            scores.append(score)
            found = f"{score.mean:7.1%} +- {score.error:.1%}"
            log(f"{score.task:<18} {score.length:>9,} tokens  {found} of {score.samples}")
        if not all(score.mean for score in scores):
            log(_chance(loaded))
        results["scores"] = [dataclasses.asdict(score) for score in scores]
    return results


def _chance(loaded: LoadedModel) -> str:
    train = loaded.config.train
    return (
        "note: 0.0 % is the level of chance: the answers are numbers and words made up for each "
        "question, which nobody guesses without\n  looking them up in the text. Models learn that "
        f"after billions of tokens; the whole run of this one has {train.tokens:,}"
    )


def _scores(
    args: argparse.Namespace,
    loaded: LoadedModel,
    names: Sequence[str],
    lengths: Sequence[int],
    is_quiet: bool = False,
) -> Iterator[Score]:
    from hysparse_megatron.inference.generate import Settings, generate

    tokenizer = tokenizer_of(args, loaded)

    def count(text: str) -> int:
        return len(tokenizer.encode_prompt(text))

    def continue_all(prompts: Sequence[str], max_new_tokens: int) -> list[str]:
        ids = [tokenizer.encode_prompt(prompt) for prompt in prompts]
        ends = frozenset({tokenizer.end_of_document})
        settings = Settings(max_new_tokens, stop_tokens=ends, holes=tokenizer.holes)
        made = generate(loaded, ids, settings)
        return [tokenizer.decode(tokens) for tokens in made.tokens]

    for name in names:
        for length in lengths:
            require_room(name, length, count)
    questions = args.samples * len(names) * len(lengths)
    label = f"{questions:,} questions of up to {max(lengths):,} tokens"
    # Long texts take their time: by tokens, so that the time left is about right.
    progress = Progress(label, args.samples * len(names) * sum(lengths), is_quiet)
    for name in names:
        for length in lengths:
            yield ask(
                name,
                length,
                samples=args.samples,
                seed=args.seed,
                count=count,
                continue_all=continue_all,
                batch_size=args.batch_size,
                answered=progress.by(length),
            )


def _loss(
    args: argparse.Namespace,
    loaded: LoadedModel,
    length: int,
    note: Callable[[str], None],
    is_quiet: bool,
) -> tuple[Bin, list[Bin], int]:
    """The loss on sequences of `length` tokens, by position too, and how many they are."""
    from hysparse_megatron.evaluation.held_out import held_out_batches, token_losses
    from hysparse_megatron.evaluation.positions import loss_by_position

    wanted = args.sequences or _sequences(loaded)
    batches = held_out_batches(loaded, length, wanted, args.batch_size, args.data, note)
    label = f"held-out loss of {batches.num_samples:,} sequences of {length:,} tokens"
    losses = Progress(label, batches.num_batches, is_quiet).counting(token_losses(loaded, batches))
    whole, bins = loss_by_position(losses, args.bins)
    return whole, bins, batches.num_samples


def _sequences(loaded: LoadedModel) -> int:
    """As many as in the evaluations of the run; of one that has none, as by default."""
    by_default = TrainConfig.eval_batches * loaded.config.train.global_batch_size
    return loaded.num_eval_samples or by_default


def _differences(args: argparse.Namespace, loaded: LoadedModel, length: int) -> Iterator[str]:
    """Why this is not the loss that training told after this step."""
    train, samples = loaded.config.train, loaded.num_eval_samples
    if not samples:
        yield "training itself never evaluated: train.eval_batches is 0"
        return
    if length != train.seq_length:
        yield f"training evaluated sequences of {train.seq_length:,} tokens"
    if args.sequences not in (None, samples):
        yield f"training evaluated {samples:,} sequences, if there were as many"
    if args.data is not None:
        yield "training evaluated its own data"


def _loss_table(length: int, sequences: int, whole: Bin, bins: Sequence[Bin]) -> str:
    lines = [
        f"held-out loss in {sequences:,} sequences of {length:,} tokens: {whole.loss:.4f}, "
        f"perplexity {whole.perplexity:.3f} ({whole.tokens:,} tokens)"
    ]
    lines += [
        f"  positions {one.first:>8,} to {one.last:>8,}  {one.loss:.4f}  {one.perplexity:.3f}"
        for one in bins
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
