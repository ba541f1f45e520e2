"""What lets megatron-core run without CUDA: devices that turn into the CPU, random streams."""

import sys
from typing import Any

import pytest
import torch

from hysparse_megatron.runtime import megatron_on_cpu
from tests.captured import captured

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="inactive where CUDA is used")

MODEL_PARALLEL = "model-parallel-rng"


@pytest.fixture(autouse=True, scope="module")
def installed() -> None:
    assert megatron_on_cpu.install()
    assert megatron_on_cpu.is_active()


@pytest.fixture
def tracker(seed: int) -> Any:
    made = megatron_on_cpu._make_tracker()
    made.add(MODEL_PARALLEL, 11)
    made.add("other", 12)
    return made


def replaced() -> tuple[Any, ...]:
    from megatron.core.tensor_parallel import random as megatron_random

    tracker = megatron_random._CUDA_RNG_STATE_TRACKER
    return torch.empty, torch.Tensor.to, torch.cuda.current_device, tracker


def test_installing_twice_changes_nothing_more() -> None:
    before = replaced()
    assert megatron_on_cpu.install()
    assert replaced() == before


def test_a_machine_with_cuda_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(megatron_on_cpu, "_installed", False)
    before = replaced()
    assert megatron_on_cpu.install() is False
    assert not megatron_on_cpu.is_active()
    assert replaced() == before


@pytest.mark.parametrize("device", ["cuda", "cuda:1", torch.device("cuda"), torch.device("cuda:0")])
def test_factories(device: Any) -> None:
    like = torch.zeros(3)
    made = [
        torch.arange(3, device=device),
        torch.empty(3, device=device),
        torch.empty_like(like, device=device),
        torch.empty_strided((3,), (1,), device=device),
        torch.full((3,), 1.0, device=device),
        torch.full_like(like, 1.0, device=device),
        torch.ones(3, device=device),
        torch.ones_like(like, device=device),
        torch.rand(3, device=device),
        torch.randn(3, device=device),
        torch.randint(0, 2, (3,), device=device),
        torch.tensor([1, 2, 3], device=device),
        torch.zeros(3, device=device),
        torch.zeros_like(like, device=device),
    ]
    for tensor in made:
        assert tensor.device.type == "cpu"
        assert tensor.shape == (3,)
    assert torch.ones(2, dtype=torch.int64, device=device).dtype == torch.int64


@pytest.mark.parametrize("device", ["cuda", torch.device("cuda:0")])
def test_moves(device: Any) -> None:
    x = torch.arange(3.0)
    for moved in (
        x.cuda(),
        x.cuda(0),
        x.cuda(non_blocking=True),
        x.to(device),
        x.to(device=device),
        x.to(device, non_blocking=True),
    ):
        assert moved.device.type == "cpu"
        assert torch.equal(moved, x)
    assert x.to(device, torch.float64).dtype == torch.float64
    assert x.to(device=device, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert x.to(torch.int32).dtype == torch.int32
    assert x.to("meta").device.type == "meta"
    assert torch.empty(2, device="meta").device.type == "meta"
    x.requires_grad_()
    x.cuda().sum().backward()
    assert torch.equal(x.grad, torch.ones(3))


def test_devices_of_contexts() -> None:
    """A model without memory is built in one, with factories that are no functions of PyTorch's."""
    with torch.device("meta"):
        assert torch.empty(2).device.type == "meta"
        assert torch.zeros_like(torch.ones(2)).device.type == "meta"
        assert torch.nn.Linear(2, 3).weight.device.type == "meta"
        assert torch.empty(2, device="cuda").device.type == "cpu"
    assert torch.empty(2).device.type == "cpu"


def test_type_names_are_those_of_cuda() -> None:
    for dtype, name in (
        (torch.float32, "torch.cuda.FloatTensor"),
        (torch.bfloat16, "torch.cuda.BFloat16Tensor"),
        (torch.float16, "torch.cuda.HalfTensor"),
    ):
        assert torch.zeros(1, dtype=dtype).type() == name
    # The other use of the same method still converts.
    assert torch.zeros(1).type(torch.float64).dtype == torch.float64


def test_stand_ins_of_the_runtime() -> None:
    assert torch.device(torch.cuda.current_device()).type == "cpu"
    torch.cuda.synchronize()
    torch.cuda.current_stream().wait_stream(torch.cuda.current_stream())
    torch.cuda.current_stream().synchronize()
    with torch.cuda.stream(torch.cuda.current_stream()):
        torch.cuda.nvtx.range_push("x")
        torch.cuda.nvtx.range_pop()
    assert torch.zeros(2, device=torch.cuda.current_device()).device.type == "cpu"


def drawn_from(seed: int, count: int) -> torch.Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed))


def test_a_fork_draws_from_its_own_stream_and_restores_the_outer_one(tracker: Any) -> None:
    torch.manual_seed(5)
    before = torch.rand(2)
    with tracker.fork():
        first = torch.rand(3)
    middle = torch.rand(2)
    with tracker.fork():
        second = torch.rand(3)
    assert torch.equal(torch.cat([first, second]), drawn_from(11, 6))
    assert torch.equal(torch.cat([before, middle, torch.rand(2)]), drawn_from(5, 6))


def test_nested_forks(tracker: Any) -> None:
    torch.manual_seed(5)
    with tracker.fork():
        outer = [torch.rand(1)]
        with tracker.fork("other"):
            other = [torch.rand(1)]
            with tracker.fork(MODEL_PARALLEL):
                outer.append(torch.rand(1))
            other.append(torch.rand(1))
        outer.append(torch.rand(1))
    assert torch.equal(torch.cat(outer), drawn_from(11, 3))
    assert torch.equal(torch.cat(other), drawn_from(12, 2))
    assert torch.equal(torch.rand(2), drawn_from(5, 2))


def test_a_fork_that_fails_restores_both_streams(tracker: Any) -> None:
    def draw_and_fail() -> None:
        with tracker.fork():
            torch.rand(1)
            raise RuntimeError("inside")

    torch.manual_seed(5)
    with pytest.raises(RuntimeError, match="inside"):
        draw_and_fail()
    assert torch.equal(torch.rand(2), drawn_from(5, 2))
    with tracker.fork():
        assert torch.equal(torch.rand(1), drawn_from(11, 2)[1:])


def test_saved_states_repeat_the_draws(tracker: Any) -> None:
    with tracker.fork():
        torch.rand(3)
    states = tracker.get_states()
    with tracker.fork():
        first = torch.rand(4)
    tracker.set_states(states)
    with tracker.fork():
        assert torch.equal(torch.rand(4), first)


def test_names_and_seeds_are_used_once(tracker: Any) -> None:
    with pytest.raises(ValueError, match="already in use"):
        tracker.add("third", 11)
    with pytest.raises(ValueError, match="already in use"):
        tracker.add(MODEL_PARALLEL, 13)
    with pytest.raises(KeyError, match="never added"), tracker.fork("third"):
        pass
    tracker.reset()
    tracker.add(MODEL_PARALLEL, 11)


def test_recompute_repeats_the_random_numbers_of_both_streams(seed: int) -> None:
    from megatron.core import tensor_parallel
    from megatron.core.tensor_parallel import random as megatron_random

    tracker = megatron_random.get_cuda_rng_tracker()
    tracker.reset()
    tracker.add(MODEL_PARALLEL, 11)
    seen = []

    def noisy(x: torch.Tensor) -> torch.Tensor:
        with tracker.fork():
            inner = torch.rand_like(x)
        seen.append((inner, torch.rand_like(x)))
        return x * seen[-1][0] * seen[-1][1]

    x = torch.ones(5, requires_grad=True)
    y = tensor_parallel.checkpoint(noisy, False, x)
    after = torch.get_rng_state()
    y.sum().backward()
    (first, second), (again_first, again_second) = seen
    assert torch.equal(first, again_first)
    assert torch.equal(second, again_second)
    assert torch.equal(x.grad, first * second)
    assert torch.equal(torch.get_rng_state(), after), "the backward pass must not shift the stream"


@pytest.mark.thorough
def test_the_kernels_of_installed_packages_are_left_alone() -> None:
    """As if megatron-core had found Transformer Engine, whose kernels take CUDA tensors only."""
    code = """
from megatron.core import optimizer, utils
from megatron.core.optimizer import clip_grads, distrib_optimizer
import torch
found = object()
for name in ("multi_tensor_applier", "l2_norm_impl", "multi_tensor_scale_impl",
             "multi_tensor_scale_tensor_impl"):
    setattr(clip_grads, name, found)
optimizer.Adam = distrib_optimizer.Adam = optimizer.SGD = found
optimizer.USING_PYTORCH_OPTIMIZER = False
distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_TE_OPTIMIZER = True
from hysparse_megatron.runtime import megatron_on_cpu
assert megatron_on_cpu.install()
norm, _ = clip_grads.multi_tensor_applier(
    clip_grads.l2_norm_impl, None, [[torch.full((4,), 3.0)]], False)
assert float(norm) == 6.0, norm
assert clip_grads.multi_tensor_scale_tensor_impl is None
assert optimizer.Adam is distrib_optimizer.Adam is torch.optim.AdamW
assert optimizer.SGD is torch.optim.SGD
assert optimizer.USING_PYTORCH_OPTIMIZER
assert not (distrib_optimizer.HAVE_APEX_OR_TE or distrib_optimizer.USING_TE_OPTIMIZER)
"""
    captured([sys.executable, "-c", code])
