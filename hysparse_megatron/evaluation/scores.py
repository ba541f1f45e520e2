"""Ask a model the questions of `tasks`, and tell how many it answers."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from hysparse_megatron.errors import ConfigError
from hysparse_megatron.evaluation.tasks import TASKS, CountTokens, Question, smallest_length

Continue = Callable[[Sequence[str], int], list[str]]
"""Continues each prompt greedily by at most so many tokens."""

_MARGIN = 4
"""Tokens a continuation may be longer than the answer: other spacing, a comma."""


@dataclass(frozen=True)
class Score:
    """One task at one length."""

    task: str
    length: int
    """Tokens of a question with its answer, at most."""
    samples: int
    mean: float
    """Share of the answers found, 0 to 1."""
    error: float
    """Standard error of the mean."""


def ask(
    task: str,
    length: int,
    *,
    samples: int,
    seed: int,
    count: CountTokens,
    continue_all: Continue,
    batch_size: int = 8,
    answered: Callable[[int], None] = lambda number: None,
) -> Score:
    """Ask `samples` questions of about `length` tokens. The same seed asks the same questions.

    Calls `answered` with the number of questions of every batch that is done.

    Raises ConfigError if the length has no room for the question.
    """
    require_room(task, length, count)
    scores: list[float] = []
    for questions in _batches(task, length, samples, seed, count, batch_size):
        prompts = [question.prompt for question in questions]
        tokens = max(count(f" {' '.join(one.answers)}.") for one in questions) + _MARGIN
        continued = continue_all(prompts, tokens)
        scores += [one.score(text) for one, text in zip(questions, continued, strict=True)]
        answered(len(questions))
    mean = sum(scores) / len(scores)
    spread = sum((score - mean) ** 2 for score in scores) / max(1, len(scores) - 1)
    return Score(task, length, samples, mean, math.sqrt(spread / len(scores)))


def require_room(task: str, length: int, count: CountTokens) -> None:
    """Raise ConfigError unless a question of the task fits into `length` tokens."""
    least = smallest_length(task, count)
    if length < least:
        raise ConfigError(f"--lengths: got {length}; allowed at least {least} for {task}")


def _batches(
    task: str, length: int, samples: int, seed: int, count: CountTokens, batch_size: int
) -> Iterator[list[Question]]:
    for first in range(0, samples, batch_size):
        yield [
            TASKS[task](random.Random(f"{seed} {task} {length} {number}"), length, count)
            for number in range(first, min(first + batch_size, samples))
        ]
