"""Long-context questions made on the spot, in the manner of RULER (arXiv 2404.06654).

Each is a text of about a given number of tokens whose answer stands somewhere in it, and which ends
where a language model would go on with the answer. Nothing is downloaded; names, numbers and
sentences are drawn anew for every question. A model that ignores the context scores 0: the answers
are random numbers and made-up words.

| task              | what is hidden                    | what is asked                          |
|-------------------|-----------------------------------|----------------------------------------|
| needle            | one number under one name         | that number                            |
| multi_key         | numbers under many names          | the number of one of them              |
| multi_needle      | four numbers under one name       | all four                               |
| variable_tracking | chains of assignments             | all names that hold one chain's number |
| word_count        | a list of words, three frequent   | those three                            |
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

CountTokens = Callable[[str], int]
"""Tokens that a text takes."""

NUM_NEEDLES = 4
"""Numbers under one name in multi_needle, names on the way of one chain in variable_tracking."""
NUM_DISTRACTORS = 3
"""Further chains in variable_tracking, and for every 40 sentences names in multi_key."""
NUM_FREQUENT = 3
"""Frequent words in word_count."""
_SLACK_TOKENS = 8

_SUBJECTS = ("the gardener", "a visitor", "the old pilot", "their neighbour", "the young clerk")
_VERBS = ("painted", "carried", "forgot", "repaired", "described", "counted", "sold")
_OBJECTS = ("the wooden boat", "a heavy lamp", "two letters", "the stone bridge", "a small map")
_PLACES = ("near the harbour", "after the rain", "before noon", "behind the mill", "on a quiet day")
_SYLLABLES = tuple(first + vowel for first in "bdfgklmnprstvz" for vowel in "aeiou")


@dataclass(frozen=True)
class Question:
    """A text to continue, and what the continuation has to hold."""

    prompt: str
    answers: tuple[str, ...]

    def score(self, continuation: str) -> float:
        """Share of the answers that stand in it as whole words."""
        words = set(_words_of(continuation))
        return sum(answer in words for answer in self.answers) / len(self.answers)


Maker = Callable[[random.Random, int, CountTokens], Question]
"""Makes a question of at most so many tokens, its answer included."""


def needle(draw: random.Random, length: int, count: CountTokens) -> Question:
    """One number under one name."""
    name, number = _word(draw), _number(draw)
    asked = f"The secret number of {name} is"
    return _hide(draw, length, count, [f"{asked} {number}."], f"{asked}", (number,))


def multi_key(draw: random.Random, length: int, count: CountTokens) -> Question:
    """One of many names, each with a number of its own."""
    sentences = max(1, length // count(_sentence(draw)))
    names = _distinct(draw, _word, 2 + NUM_DISTRACTORS * sentences // 40)
    numbers = _distinct(draw, _number, len(names))
    hidden = [
        f"The secret number of {name} is {number}."
        for name, number in zip(names, numbers, strict=True)
    ]
    chosen = draw.randrange(len(names))
    asked = f"The secret number of {names[chosen]} is"
    return _hide(draw, length, count, hidden, asked, (numbers[chosen],))


def multi_needle(draw: random.Random, length: int, count: CountTokens) -> Question:
    """Several numbers under one name, all asked for."""
    name, numbers = _word(draw), _distinct(draw, _number, NUM_NEEDLES)
    hidden = [f"One of the secret numbers of {name} is {number}." for number in numbers]
    asked = f"All {NUM_NEEDLES} secret numbers of {name} are"
    return _hide(draw, length, count, hidden, asked, tuple(numbers))


def variable_tracking(draw: random.Random, length: int, count: CountTokens) -> Question:
    """Chains `VAR a = 12345.`, `VAR b = VAR a.`; all names of one chain are asked for."""
    num_chains = 1 + NUM_DISTRACTORS
    names = _distinct(draw, _word, num_chains * NUM_NEEDLES)
    numbers = _distinct(draw, _number, num_chains)
    chains = [names[first::num_chains] for first in range(num_chains)]
    waiting = [
        [
            f"VAR {chain[0]} = {number}.",
            *(f"VAR {new} = VAR {old}." for old, new in itertools.pairwise(chain)),
        ]
        for chain, number in zip(chains, numbers, strict=True)
    ]
    hidden = []  # the chains interleaved, each in its own order
    while any(waiting):
        hidden.append(draw.choice([chain for chain in waiting if chain]).pop(0))
    asked = f"The {NUM_NEEDLES} variables that hold {numbers[0]} are VAR"
    return _hide(draw, length, count, hidden, asked, tuple(chains[0]))


def word_count(draw: random.Random, length: int, count: CountTokens) -> Question:
    """A list of made-up words in which three come three times as often as any other."""
    asked = f"The {NUM_FREQUENT} words that come most often in this list are"
    words = _distinct(draw, _word, 400)
    frequent, rare = words[:NUM_FREQUENT], words[NUM_FREQUENT:]

    def text(size: int) -> str:
        """With `size` words of the rare kind, each two times."""
        listed = [*frequent * 6, *rare[:size] * 2]
        shuffler = random.Random(draw_seed)
        shuffler.shuffle(listed)
        return f"{' '.join(listed)}. {asked}"

    draw_seed = draw.randrange(2**32)
    room = length - count(f" {' '.join(frequent)}.") - _SLACK_TOKENS
    size = _largest(lambda size: count(text(size)) <= room, len(rare))
    return Question(text(size), tuple(frequent))


TASKS: dict[str, Maker] = {
    "needle": needle,
    "multi_key": multi_key,
    "multi_needle": multi_needle,
    "variable_tracking": variable_tracking,
    "word_count": word_count,
}


def smallest_length(task: str, count: CountTokens, seed: int = 0) -> int:
    """Tokens that a question takes with nothing around what is hidden."""
    question = TASKS[task](random.Random(seed), 1, count)
    return count(f"{question.prompt} {' '.join(question.answers)}.") + _SLACK_TOKENS


def _hide(
    draw: random.Random,
    length: int,
    count: CountTokens,
    hidden: Sequence[str],
    asked: str,
    answers: tuple[str, ...],
) -> Question:
    """`hidden` in their order at random places among sentences that fill `length` tokens."""
    room = length - count(f" {' '.join(answers)}.") - _SLACK_TOKENS
    filler = [_sentence(draw) for _ in range(max(0, 2 * room // count(_sentence(draw))))]
    places = sorted(draw.random() for _ in hidden)

    def text(size: int) -> str:
        lines = filler[:size]
        for place, sentence in reversed(list(zip(places, hidden, strict=True))):
            lines.insert(int(place * (size + 1)), sentence)
        return f"{' '.join(lines)} {asked}"

    size = _largest(lambda size: count(text(size)) <= room, len(filler))
    return Question(text(size), answers)


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number up to `most` that fits; 0 if none does."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _sentence(draw: random.Random) -> str:
    parts = (draw.choice(among) for among in (_SUBJECTS, _VERBS, _OBJECTS, _PLACES))
    return f"{' '.join(parts).capitalize()}."


def _word(draw: random.Random) -> str:
    return "".join(draw.choice(_SYLLABLES) for _ in range(3))


def _number(draw: random.Random) -> str:
    return str(draw.randrange(10**4, 10**5))


def _distinct(draw: random.Random, make: Callable[[random.Random], str], number: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < number:
        found[make(draw)] = None
    return list(found)


def _words_of(text: str) -> list[str]:
    return "".join(letter if letter.isalnum() else " " for letter in text).split()
