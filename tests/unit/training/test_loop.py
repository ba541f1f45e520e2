"""The loop: when it evaluates, saves and stops. Steps themselves are scripted."""

import contextlib
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hysparse_megatron.config.compose import compose
from hysparse_megatron.data.read.order import Position
from hysparse_megatron.errors import NumericalStop, Preempted
from hysparse_megatron.evaluation.loss import HeldOutLoss
from hysparse_megatron.training import loop
from hysparse_megatron.training.control import Deadline
from hysparse_megatron.training.step import Decide, StepResult


class Script:
    """Runs the loop and writes down what it does, in order.

    `bad` are the steps (from 1) whose loss is not finite; `stop_at` the step in which a signal
    arrives.
    """

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        steps: int,
        interval: int = 1000,
        eval_interval: int = 0,
        bad: tuple[int, ...] = (),
        stop_at: int | None = None,
        stop_in_evaluation: int | None = None,
        evaluations: tuple[str, ...] = ("validation",),
        bad_evaluation: int | None = None,
    ) -> None:
        self.bad_evaluation = bad_evaluation
        config = compose([f"train.steps={steps}", f"checkpoint.interval={interval}"])
        train = replace(config.train, eval_interval=eval_interval)
        self.state: Any = SimpleNamespace(config=replace(config, train=train))
        self.evaluations = evaluations
        self.bad, self.stop_at, self.stop_in_evaluation = bad, stop_at, stop_in_evaluation
        self.watch: Any = SimpleNamespace(
            poll=lambda raised=(): dict.fromkeys(raised, 0),
            stopping=None,
            stop_before_first_step=lambda: None,
            ending=lambda where: Preempted(f"stopped by {self.watch.stopping} {where}."),
            deadline=Deadline(None, {}),
        )
        self.saved_facts: dict[str, Any] = {}
        self.events: list[str] = []
        self.rows: list[dict[str, Any]] = []
        self.good_steps: list[int] = []
        self.around: list[tuple[int, list[str]]] = []
        self.done = 0
        monkeypatch.setattr(loop, "train_step", self._train_step)
        monkeypatch.setattr(loop, "evaluate", self._evaluate)

    def _train_step(
        self, state: Any, step: int, microbatches: list[Any], decide: Decide
    ) -> StepResult:
        assert microbatches == [f"batch {step}"]
        self.done = step + 1
        self.events.append(f"step {self.done}")
        is_bad = self.done in self.bad
        loss = float("nan") if is_bad else 1.0 / self.done
        self.watch.stopping = "SIGTERM on rank 0" if self.done == self.stop_at else None
        return StepResult(loss, 0.5, 1e-3, bad=decide(not is_bad, loss, 0.5))

    def _evaluate(
        self, state: Any, batches: Iterable[Any], go_on: Callable[[], bool]
    ) -> HeldOutLoss | None:
        found = []
        for batch in batches:
            if self.done == self.stop_in_evaluation:
                self.watch.stopping = "SIGUSR1 on rank 0"
            if not go_on():
                return None
            found.append(batch)
        assert found == [["held out 0"], ["held out 1"]]
        self.events.append(f"evaluate {self.done}")
        return HeldOutLoss(100, float("nan") if self.done == self.bad_evaluation else 2.0)

    def run(self, first_step: int = 0, facts: dict[str, Any] | None = None) -> "Script":
        self.done = first_step
        batches: Any = SimpleNamespace(
            microbatches=lambda at: iter([f"batch {at.steps}"]),
            sample_ids=lambda at: np.array([10 * at.steps, 10 * at.steps + 1]),
            after=lambda at: Position(at.samples + self.size(at.steps), 7, at.steps + 1),
        )
        evaluation: Any = SimpleNamespace(
            num_batches=2, microbatches=lambda index: iter([f"held out {index}"])
        )
        hooks = loop.Hooks(
            on_row=[self.rows.append],
            save=self._save,
            observe=self._observe,
            measure=self._measure,
            on_good_step=lambda: self.good_steps.append(self.done),
            around_step=self._around_step,
        )
        samples = sum(self.size(step) for step in range(first_step))
        progress = loop.Progress(first_step, Position(samples, 7, first_step), facts or {})
        sets = dict.fromkeys(self.evaluations, evaluation)
        loop.train(self.state, batches, sets, progress, self.watch, hooks)
        return self

    @contextlib.contextmanager
    def _around_step(self, step: int) -> Iterator[None]:
        before = len(self.events)
        yield
        self.around.append((step, self.events[before:]))

    @staticmethod
    def size(step: int) -> int:
        """Of the step's batch: they grow."""
        return 2 + step

    @contextlib.contextmanager
    def _observe(self, step: int) -> Iterator[Callable[[], dict[str, Any]]]:
        started = len(self.events)
        yield lambda: {"seen": [step, *self.events[started:]]}

    def _measure(
        self, step: int, tokens: int, seconds: float, data_seconds: float
    ) -> dict[str, Any]:
        return {"measured": [step, tokens, seconds, data_seconds]}

    def _save(self, step: int, facts: dict[str, Any]) -> None:
        self.events.append(f"save {step}")
        self.saved_facts = json.loads(json.dumps(facts))


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Script]:
    return lambda **settings: Script(monkeypatch, **settings)


def test_intervals(script: Callable[..., Script]) -> None:
    found = script(steps=7, interval=3, eval_interval=2).run()
    assert found.events == [
        "evaluate 0",
        "step 1",
        "step 2",
        "evaluate 2",
        "step 3",
        "save 3",
        "step 4",
        "evaluate 4",
        "step 5",
        "step 6",
        "evaluate 6",
        "save 6",
        "step 7",
        "evaluate 7",
        "save 7",
    ]


def test_what_goes_around_a_step_leaves_evaluations_and_saves_out(
    script: Callable[..., Script],
) -> None:
    found = script(steps=4, interval=1, eval_interval=1).run(first_step=2)
    assert found.around == [(3, ["step 3"]), (4, ["step 4"])]


def test_without_evaluation_only_at_start_and_end(script: Callable[..., Script]) -> None:
    assert script(steps=2).run().events == [
        "evaluate 0",
        "step 1",
        "step 2",
        "evaluate 2",
        "save 2",
    ]


def test_evaluation_switched_off(script: Callable[..., Script]) -> None:
    found = script(steps=2, eval_interval=1, evaluations=()).run()
    assert found.events == ["step 1", "step 2", "save 2"]
    assert ["eval_loss" in row for row in found.rows] == [False, False]


def test_every_set_has_its_row(script: Callable[..., Script]) -> None:
    """What the architecture does is seen on the run's own split."""
    found = script(steps=1, evaluations=("validation", "code")).run()
    assert found.events == [
        "evaluate 0",
        "evaluate 0",
        "step 1",
        "evaluate 1",
        "evaluate 1",
        "save 1",
    ]
    rows = [(row["step"], row["evaluation"]) for row in found.rows if "eval_loss" in row]
    assert rows == [(0, "validation"), (0, "code"), (1, "validation"), (1, "code")]
    assert [row["step"] for row in found.rows if "seen" in row] == [0, 1]


def test_a_resumed_run_does_what_was_left(script: Callable[..., Script]) -> None:
    whole = script(steps=6, interval=2, eval_interval=3).run().events
    rest = script(steps=6, interval=2, eval_interval=3).run(first_step=4).events
    assert rest == whole[whole.index("step 5") :]


def test_rows(script: Callable[..., Script]) -> None:
    found = script(steps=2, bad=(1,)).run()
    length = found.state.config.train.seq_length
    start, first, second, end = found.rows
    assert (start["step"], start["eval_loss"], end["step"]) == (0, 2.0, 2)
    assert set(first) == {
        "step",
        "loss",
        "grad_norm",
        "learning_rate",
        "global_batch_size",
        "samples",
        "tokens",
        "tokens_per_second",
        "step_seconds",
        "data_seconds",
        "skipped",
        "bad",
        "skipped_steps",
        "sample_ids",
        "measured",
    }
    assert start.keys() == {
        "step", "evaluation", "eval_loss", "eval_tokens", "eval_perplexity", "eval_seconds", "seen"
    }  # fmt: skip
    assert (start["evaluation"], start["eval_tokens"]) == ("validation", 100)
    assert start["eval_perplexity"] == pytest.approx(math.exp(2.0))
    assert (start["seen"], end["seen"]) == ([0, "evaluate 0"], [2, "evaluate 2"])
    assert second["measured"] == [2, 3 * length, second["step_seconds"], second["data_seconds"]]
    assert first["bad"] == "loss not finite on rank 0"
    assert (first["skipped_steps"], first["sample_ids"]) == (1, [0, 1])
    assert "sample_ids" not in second
    assert (first["step"], first["skipped"], first["tokens"]) == (1, True, 2 * length)
    assert (second["step"], second["skipped"], second["tokens"]) == (2, False, 5 * length)
    assert [(row["global_batch_size"], row["samples"]) for row in (first, second)] == [
        (2, 2),
        (3, 5),
    ]
    assert second["loss"] == 0.5
    assert second["tokens_per_second"] == pytest.approx(3 * length / second["step_seconds"])


def test_five_bad_steps_in_a_row_stop_the_run(script: Callable[..., Script]) -> None:
    found = script(steps=50, interval=2, bad=tuple(range(4, 51)))
    with pytest.raises(
        NumericalStop, match=r"5 bad steps in a row up to step 8.*\[70, 71\]"
    ) as caught:
        found.run()
    assert caught.value.exit_code == 4
    # The newest checkpoint is the last one before the bad steps.
    saves = [event for event in found.events if event.startswith("save")]
    assert saves == ["save 2"]
    assert found.rows[-1]["step"] == 8, "the last bad step has its row"


@pytest.mark.parametrize("step", [0, 4, 6])
def test_nothing_is_saved_after_an_evaluation_that_is_not_finite(
    step: int, script: Callable[..., Script]
) -> None:
    """At the start, where a checkpoint is due, and at the end."""
    found = script(steps=6, interval=2, eval_interval=4, bad_evaluation=step)
    with pytest.raises(NumericalStop, match=rf"loss on validation is nan after step {step}"):
        found.run()
    assert found.events[-1] == f"evaluate {step}"
    assert math.isnan(found.rows[-1]["eval_loss"]), "it has its row all the same"


def test_good_steps_are_told(script: Callable[..., Script]) -> None:
    assert script(steps=5, bad=(2, 3)).run().good_steps == [1, 4, 5]


def test_a_good_step_in_between_starts_the_count_anew(script: Callable[..., Script]) -> None:
    bad = (1, 2, 3, 4, 6, 7, 8, 9)
    found = script(steps=10, interval=1, bad=bad).run()
    saves = [event for event in found.events if event.startswith("save")]
    assert saves == ["save 5", "save 10"]


def test_a_signal_saves_first_and_then_stops(script: Callable[..., Script]) -> None:
    found = script(steps=9, interval=4, stop_at=6)
    with pytest.raises(
        Preempted, match=r"SIGTERM on rank 0 after step 6; saved at step 6"
    ) as caught:
        found.run()
    assert caught.value.exit_code == 3
    assert found.events[-2:] == ["step 6", "save 6"]


def test_a_signal_at_a_checkpoint_saves_once(script: Callable[..., Script]) -> None:
    found = script(steps=9, interval=3, stop_at=6)
    with pytest.raises(Preempted):
        found.run()
    assert found.events.count("save 6") == 1


@pytest.mark.parametrize("stop", [{"stop_at": 3}, {"stop_in_evaluation": 3}])
def test_a_stop_does_not_wait_for_the_last_evaluation(
    script: Callable[..., Script], stop: dict[str, int]
) -> None:
    """Which may be of the whole split, and longer than what a cluster gives before it kills."""
    stopped = script(steps=3, **stop)
    with pytest.raises(Preempted, match="after step 3; saved at step 3"):
        stopped.run()
    assert stopped.events[-2:] == ["step 3", "save 3"]
    rest = script(steps=3).run(first_step=3, facts=stopped.saved_facts)
    assert rest.events == ["evaluate 3"]


def test_a_signal_amid_bad_steps_keeps_the_checkpoint_before_them(
    script: Callable[..., Script],
) -> None:
    found = script(steps=9, interval=2, bad=(5, 6), stop_at=6)
    with pytest.raises(Preempted, match="saved at step 4"):
        found.run()
    assert [event for event in found.events if event.startswith("save")] == ["save 2", "save 4"]


def test_a_stop_loses_no_good_step_to_a_bad_one(script: Callable[..., Script]) -> None:
    found = script(steps=9, interval=100, bad=(6,), stop_at=6)
    with pytest.raises(Preempted, match="after step 6; saved at step 6"):
        found.run()
    assert found.events[-1] == "save 6"


def test_a_checkpoint_that_is_due_at_a_bad_step_comes_after_it(
    script: Callable[..., Script],
) -> None:
    found = script(steps=12, interval=4, bad=(4, 5, 8)).run()
    saves = [event for event in found.events if event.startswith("save")]
    assert saves == ["save 6", "save 9", "save 12"]


def test_a_bad_last_step_does_not_end_without_a_checkpoint(script: Callable[..., Script]) -> None:
    """A skipped update leaves the weights of the step before; the run must not lose those."""
    found = script(steps=5, interval=100, bad=(5,)).run()
    assert found.events[-1] == "save 5"


def test_a_stop_in_an_evaluation_saves_and_makes_up_for_it(script: Callable[..., Script]) -> None:
    settings = {"steps": 6, "eval_interval": 2}
    stopped = script(**settings, stop_in_evaluation=4)
    with pytest.raises(Preempted, match="SIGUSR1 on rank 0 after step 4; saved at step 4"):
        stopped.run()
    assert stopped.events[-2:] == ["step 4", "save 4"]
    rest = script(**settings).run(first_step=4, facts=stopped.saved_facts)
    assert rest.events[:2] == ["evaluate 4", "step 5"]


def test_the_past_of_the_guard_is_in_the_checkpoint(script: Callable[..., Script]) -> None:
    found = script(steps=4, bad=(2,)).run()
    assert found.saved_facts["guard"]["losses"] == [1.0, 1 / 3, 1 / 4]
    rest = script(steps=6).run(first_step=4, facts=found.saved_facts)
    assert rest.saved_facts["guard"]["losses"] == [1.0, 1 / 3, 1 / 4, 1 / 5, 1 / 6]
    assert rest.saved_facts["guard"]["skipped"] == 1
