"""Impossible plans are refused with plans that work, and suggestions are what they promise."""

import re
import time

import pytest

from hysparse_megatron.config.compose import compose
from hysparse_megatron.config.schema import Config
from hysparse_megatron.config.validate import validate
from hysparse_megatron.errors import ConfigError
from hysparse_megatron.plan.memory import GIB
from hysparse_megatron.plan.overview import make_overview
from hysparse_megatron.plan.suggest import check, nearest, suggest

pytestmark = pytest.mark.thorough

BASE = [
    "cluster=h100",
    "train.precision=bf16",
    "train.seq_length=8192",
    "train.global_batch_size=256",
    "train.micro_batch_size=1",
]
LARGE = ["model=hysparse_80b_a3b", *BASE]
WORKS = [*LARGE, "parallel.ep=32", "parallel.pp=2", "train.recompute=full"]
GPUS = 64


def refusal(overrides: list[str]) -> tuple[str, ConfigError]:
    with pytest.raises(ConfigError) as caught:
        check(compose(overrides), GPUS)
    assert caught.value.exit_code == 2
    return str(caught.value), caught.value


def assert_named_plans_work(message: str, overrides: list[str]) -> None:
    """Every plan the message names passes the same check, as a user would type it."""
    named = re.findall(r"^  (parallel\.tp=.*?)  \(", message, flags=re.M)
    assert named
    for plan in named:
        check(compose([*overrides, *plan.split()]), GPUS)


def test_a_plan_that_works_is_left_alone() -> None:
    check(compose(WORKS), GPUS)


BAD_PLANS = [
    # overrides, key, part of the message
    (["parallel.ep=24"], "parallel.ep", "a divisor of model.moe.num_experts = 512"),
    (["parallel.ep=128"], "parallel.ep", "a divisor of the world size, which is 64"),
    (
        ["parallel.tp=3", "parallel.sequence_parallel=true"],
        "model.num_attention_heads",
        "a multiple of parallel.tp = 3",
    ),
    (["parallel.tp=2"], "parallel.sequence_parallel", "true with experts"),
    (["parallel.pp=64"], "model.layout", "49 layers cannot fill 64"),
    (["parallel.pp=64", "parallel.ep=7"], "parallel.ep", "a divisor of model.moe.num_experts"),
    (["train.micro_batch_size=3"], "train.global_batch_size", "a multiple of"),
    (["parallel.ep=1"], "cluster.memory_gib", "at most 79 GiB"),
]


@pytest.mark.parametrize(("overrides", "key", "text"), BAD_PLANS, ids=lambda part: str(part))
def test_bad_plans_are_refused_with_the_nearest_that_work(
    overrides: list[str], key: str, text: str
) -> None:
    message, error = refusal([*LARGE, *overrides])
    assert key in {problem.key for problem in error.problems}
    assert text in message
    assert "nearest plans that work:" in message
    assert_named_plans_work(message, [*LARGE, *overrides])


def test_what_no_plan_can_mend_gets_none() -> None:
    message, _ = refusal([*WORKS, "optim.learning_rate=-1"])
    assert "nearest plans" not in message
    message, _ = refusal([*WORKS, "parallel.ep=24", "cluster.memory_gib=4"])
    assert "no plan of this model and batch works on 64 ranks" in message


@pytest.mark.parametrize("ranks", [10**9, 2**40, 999_999_999_989], ids=str)
def test_any_number_of_ranks_is_answered_at_once(ranks: int) -> None:
    start = time.monotonic()
    assert suggest(compose(WORKS), ranks) == []
    assert time.monotonic() - start < 60


@pytest.mark.parametrize(
    "mistake",
    [
        "model.layout=F 3*S X",
        "model.layout=S F",
        "model.num_attention_heads=7",
        "model.moe.num_active_experts=513",
    ],
)
@pytest.mark.parametrize("ranks", [1, GPUS])
def test_a_mistake_of_the_model_stands_alone(mistake: str, ranks: int) -> None:
    config = compose(["model=hysparse_80b_a3b", *BASE, mistake])
    with pytest.raises(ConfigError) as caught:
        check(config, ranks)
    assert "works on" not in str(caught.value)
    assert "nearest" not in str(caught.value)


def test_the_nearest_plan_changes_only_what_is_wrong() -> None:
    plan = nearest(compose([*WORKS, "parallel.ep=24"]), GPUS, 1)[0].overview.config
    assert (plan.parallel.pp, plan.parallel.tp, plan.parallel.ep) == (2, 1, 32)
    working = compose(WORKS)
    assert nearest(working, GPUS, 1)[0].overview.config == working


def step_seconds(config: Config) -> float:
    return make_overview(config, GPUS).time.seconds


@pytest.mark.parametrize("model", ["hysparse_80b_a3b", "full_80b_a3b", "hysparse_7b"])
def test_suggestions_fit_and_the_fastest_comes_first(model: str) -> None:
    config = compose([f"model={model}", *BASE])
    start = time.process_time()
    plans = suggest(config, GPUS, count=10)
    assert time.process_time() - start < 10
    assert len(plans) == 10
    seconds = [step_seconds(plan.overview.config) for plan in plans]
    assert seconds == sorted(seconds)
    assert len({plan.overrides for plan in plans}) == 10
    for plan in plans:
        assert validate(plan.overview.config, world_size=GPUS) == []
        assert plan.overview.peak_bytes <= 79 * GIB
        check(compose([f"model={model}", *BASE, *plan.overrides.split()]), GPUS)


@pytest.mark.parametrize(
    "asked",
    [
        ["parallel.cp=3", "parallel.ep=2", "parallel.num_distributed_optimizer_instances=3"],
        ["parallel.cp=4", "parallel.cp_keep_kv=false", "train.seq_length=65536"],
        ["optim=muon", "parallel.num_distributed_optimizer_instances=2"],
        ["model.fp8=tensorwise", "train.seq_length=32768"],
    ],
    ids=" ".join,
)
def test_what_a_suggestion_says_is_the_plan_that_it_means(asked: list[str]) -> None:
    """Typed behind what it was asked with, whatever of that is in its way."""
    given = ["model=hysparse_7b", *BASE, *asked]
    plans = [*suggest(compose(given), 8, 8), *nearest(compose(given), 8, 3)]
    assert len(plans) > 3
    for plan in plans:
        meant, typed = plan.overview.config, compose([*given, *plan.overrides.split()])
        assert (typed.parallel, typed.train) == (meant.parallel, meant.train)
        check(typed, 8)


def test_without_a_known_memory_nothing_is_refused_for_it() -> None:
    check(compose([*LARGE, "cluster=this_machine", "parallel.ep=1"]), GPUS)


def test_parts_that_are_recomputed_stay_those_that_were_chosen() -> None:
    chosen = ["train.recompute=selective", "train.recompute_modules=[norm,feed_forward]"]
    plans = suggest(compose(["model=hysparse_7b", *BASE, *chosen]), 8, 3)
    assert plans
    for plan in plans:
        assert "train.recompute=selective" in plan.overrides
        assert validate(plan.overview.config, world_size=8) == []


def test_flops_of_what_is_recomputed() -> None:
    def extra(*settings: str) -> float:
        overview = make_overview(compose([*LARGE, "parallel.ep=8", *settings]), GPUS)
        return overview.training_flops_per_token / overview.flops.total - 3

    def of(*modules: str) -> tuple[str, str]:
        return "train.recompute=selective", f"train.recompute_modules=[{','.join(modules)}]"

    attention, experts = extra(*of("attention")), extra(*of("experts"))
    assert extra(*of("norm")) == 0 < attention < experts
    assert extra(*of("attention", "norm", "experts")) == pytest.approx(attention + experts)
    # One hybrid block, and two.
    some, most = (extra("train.recompute=full", f"train.recompute_layers={n}") for n in (12, 24))
    assert most == pytest.approx(2 * some)
    flops = make_overview(compose([*LARGE, "parallel.ep=8"]), GPUS).flops
    assert 0 < most < extra("train.recompute=full") == pytest.approx(1 - flops.output / flops.total)
    assert extra("train.loss_chunk=1024") == pytest.approx(flops.output / flops.total)
