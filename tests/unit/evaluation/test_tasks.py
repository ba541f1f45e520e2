"""Synthetic tasks: their lengths, their answers, and that they can be answered by copying alone."""

import random
import re
from collections.abc import Sequence

import pytest

from hysparse_megatron.errors import ConfigError
from hysparse_megatron.evaluation.scores import ask
from hysparse_megatron.evaluation.tasks import TASKS, Question, smallest_length
from tests.unit.evaluation.copying import copy_from

pytestmark = pytest.mark.usefixtures("seed")


def words(text: str) -> int:
    """A tokenizer of words and punctuation."""
    return len(re.findall(r"\w+|[^\w\s]", text))


@pytest.mark.parametrize("task", TASKS)
def test_copying_answers_everything(task: str) -> None:
    length = random.randint(smallest_length(task, words) + 20, 900)
    score = ask(
        task,
        length,
        samples=12,
        seed=random.randrange(10**9),
        count=words,
        continue_all=lambda prompts, limit: [copy_from(prompt) for prompt in prompts],
    )
    assert (score.mean, score.error) == (1.0, 0.0)


@pytest.mark.parametrize("task", TASKS)
def test_without_the_context_nothing_is_answered(task: str) -> None:
    """Plausible words and numbers of the right kind."""
    draw = random.Random(random.getrandbits(31))

    def guess(prompts: Sequence[str], limit: int) -> list[str]:
        other = TASKS[task](draw, 300, words)
        return [" ".join(other.answers)] * len(prompts)

    score = ask(task, 300, samples=20, seed=draw.randrange(10**9), count=words, continue_all=guess)
    assert score.mean < 0.05


@pytest.mark.parametrize("task", TASKS)
def test_questions_fill_their_length_and_no_more(task: str) -> None:
    draw = random.Random(random.getrandbits(31))
    for _ in range(5):
        length = draw.randint(smallest_length(task, words), 1000)
        question = TASKS[task](draw, length, words)
        whole = words(f"{question.prompt} {' '.join(question.answers)}.")
        assert whole <= length
        if task != "word_count":  # which runs out of words
            assert whole > length - 40


def test_the_same_seed_asks_the_same_questions() -> None:
    asked: list[list[str]] = []

    def remember(prompts: Sequence[str], limit: int) -> list[str]:
        asked.append(list(prompts))
        return [""] * len(prompts)

    for seed in (1, 1, 2):
        ask("needle", 200, samples=4, seed=seed, count=words, continue_all=remember)
    assert asked[0] == asked[1]
    assert not set(asked[0]) & set(asked[2])


def test_needles_lie_anywhere() -> None:
    draw = random.Random(random.getrandbits(31))
    places = []
    for _ in range(60):
        question = TASKS["needle"](draw, 500, words)
        places.append(question.prompt.index(question.answers[0]) / len(question.prompt))
    assert min(places) < 0.2
    assert max(places) > 0.8


def test_a_length_without_room_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--lengths: got 20; allowed at least \d+ for multi_key"):
        ask(
            "multi_key",
            20,
            samples=1,
            seed=0,
            count=words,
            continue_all=lambda prompts, limit: [""] * len(prompts),
        )


def test_only_whole_words_count() -> None:
    question = Question("", ("12345", "bado"))
    assert question.score("12345, and bado.") == 1
    assert question.score("123456 bado") == 0.5
    assert question.score("") == 0
