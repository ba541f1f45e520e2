"""The self-test on a CPU, and that it notices a wrong result."""

import json
from typing import Any

import pytest
import torch
from hysparse_kernels import dispatch
from hysparse_kernels.selftest import __main__ as selftest
from hysparse_kernels.selftest.checks import CPU_CASES, run_case
from hysparse_kernels.selftest.comparison import TOLERANCE, relative_error, wrong_selections

from tests.captured import Call


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("no_gpu")
def test_without_a_gpu_it_says_what_would_run_and_exits_with_2(
    call: Call,
) -> None:
    printed = call(selftest.main, [], code=2).out
    assert "GPU not found; backend=auto means reference here" in printed
    assert "the Triton kernels need a CUDA device" in printed


def test_the_reference_passes_on_a_cpu(call: Call) -> None:
    assert f"{3 * len(CPU_CASES)} checks passed, 0 failed" in call(selftest.main, ["--cpu"]).out


def test_json_is_one_object(call: Call) -> None:
    report = json.loads(call(selftest.main, ["--cpu", "--json"]).out)
    assert report["exit_code"] == 0
    assert {check["operation"] for check in report["checks"]} == {
        "oracle",
        "block-sparse",
        "window",
    }
    sparse = [check for check in report["checks"] if check["operation"] == "block-sparse"]
    assert all(set(check["errors"]) == {"o", "dq", "dk", "dv", "dsink"} for check in sparse)


def test_a_wrong_result_is_a_failed_check(monkeypatch: pytest.MonkeyPatch, call: Call) -> None:
    right = dispatch.sliding_window_attention

    def wrong(*inputs: Any, window: int, **options: Any) -> Any:
        return right(*inputs, window=window - 1, **options)

    monkeypatch.setattr(dispatch, "sliding_window_attention", wrong)
    printed = call(selftest.main, ["--cpu"], code=1).out
    assert "FAILED: o above" in printed
    assert f"{2 * len(CPU_CASES)} checks passed, {len(CPU_CASES)} failed" in printed


def test_a_crash_is_a_failed_check(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_inputs: Any, **_options: Any) -> Any:
        raise RuntimeError("no such instruction\nmore")

    monkeypatch.setattr(dispatch, "block_sparse_attention", crash)
    (check,) = run_case(CPU_CASES[0], "cpu", 0)
    assert check.failures == ("RuntimeError: no such instruction",)


def test_wrong_selections_counts_rows(seed: int) -> None:
    query, key = torch.randn(1, 20, 4, 8).double(), torch.randn(1, 20, 2, 8).double()
    exact = dispatch.oracle_attention(query, key, key, block_size=4, num_selected=2)
    assert exact.block_indices is not None

    def wrong(indices: torch.Tensor) -> int:
        return wrong_selections(indices, exact, query, key, block_size=4)

    assert wrong(exact.block_indices) == 0
    worse = exact.block_indices.clone()
    # The best block left out for the worst: others may be as good as one another.
    logits = query[0, 19, 2:] @ key[0, :, 1].T * 8**-0.5 - exact.lse[0, 2:, 19, None]
    order = logits.unflatten(1, (5, 4)).amax((0, 2)).argsort()
    assert set(order[3:].tolist()) == set(worse[0, 1, 19].tolist())
    worse[0, 1, 19] = order[[0, 3]].sort().values
    assert wrong(worse) == 1
    assert wrong(exact.block_indices.flip(-1)) >= 2 * 16  # rows that can see two blocks
    twice = exact.block_indices.clone()
    twice[0, 0, 19] = twice[0, 0, 19, :1]
    assert wrong(twice) == 1


def test_errors_of_values_that_are_not_finite_are_infinite() -> None:
    assert relative_error(torch.tensor([1.0, torch.nan]), torch.ones(2)) == float("inf")
    assert relative_error(torch.ones(2), torch.ones(2)) == 0
    assert TOLERANCE[torch.float16] == 2e-3
