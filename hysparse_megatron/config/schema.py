"""Every setting of a run: its name, type and default, and why that default.

Sections are handed down one by one; nothing below `training` sees the whole tree. The members of
the enumerations are lower case because they are written in YAML and on the command line.
Fields without a default must be given by a preset or by the user.
"""

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from hysparse_megatron.architecture.bounds import above_zero, at_least, fraction
from hysparse_megatron.architecture.model import ModelConfig
from hysparse_megatron.config.batch_ramp import BatchRamp
from hysparse_megatron.config.cluster import ClusterConfig
from hysparse_megatron.config.debug import DebugConfig
from hysparse_megatron.config.parallel import ParallelConfig as ParallelConfig
from hysparse_megatron.config.tracking import TrackingConfig as TrackingConfig
from hysparse_megatron.config.tracking import TrackingMode as TrackingMode


class OptimizerName(Enum):
    """What turns gradients into updates."""

    adamw = "adamw"
    muon = "muon"


class MuonCoefficients(Enum):
    """Polynomials of Muon's Newton-Schulz iteration, as emerging-optimizers names them."""

    simple = "simple"
    quintic = "quintic"
    polar_express = "polar_express"
    cans = "cans"
    aol = "aol"
    deepseekv4 = "deepseekv4"


class MuonScale(Enum):
    """Factor on the orthogonal matrix that becomes an update, by the size of the matrix."""

    spectral = "spectral"
    unit_rms_norm = "unit_rms_norm"
    shape_scaling = "shape_scaling"


class MuonTensorParallel(Enum):
    """Which matrix Muon orthogonalises where tensor-parallel ranks hold slices of one."""

    blockwise = "blockwise"
    duplicated = "duplicated"
    distributed = "distributed"


class MatmulPrecision(Enum):
    """Precision of products of fp32 matrices; medium computes in bf16."""

    medium = "medium"
    high = "high"
    highest = "highest"


class Schedule(Enum):
    """Shape of the learning rate over the run, after the warm-up."""

    wsd = "wsd"
    cosine = "cosine"
    constant = "constant"


class Precision(Enum):
    """Number format of activations and of the parameters the model computes with."""

    fp32 = "fp32"
    bf16 = "bf16"


class Recompute(Enum):
    """What the backward pass computes again instead of keeping it from the forward pass."""

    none = "none"
    selective = "selective"
    full = "full"


class RecomputeModule(Enum):
    """A part of a layer that selective recompute makes again."""

    attention = "attention"
    norm = "norm"
    feed_forward = "feed_forward"
    experts = "experts"


@dataclass(frozen=True, kw_only=True)
class MuonConfig:
    """Muon, for the hidden matrices. The defaults are megatron-core's; AdamW ignores them."""

    momentum: float = fraction(default=0.95)
    """Decay per step of the running mean of gradients, the only state of a matrix."""
    nesterov: bool = False
    """Orthogonalise the running mean as it will be one step on, with the gradient in it twice."""
    num_ns_steps: int = at_least(1, default=5)
    """Newton-Schulz steps of an update; more bring its singular values closer to 1."""
    coefficients: MuonCoefficients = MuonCoefficients.quintic
    """Polynomials of these steps; quintic has five, and begins again after them."""
    scale_mode: MuonScale = MuonScale.spectral
    """spectral: square root of the longer side, so that entries are of order 1 like AdamW's;
    unit_rms_norm: square root of rows by columns; shape_scaling: the same, but at least 1."""
    extra_scale_factor: float = above_zero(default=1.0)
    """Factor on that; 0.2 with spectral makes updates about as large as AdamW's."""
    matmul_precision: MatmulPrecision = MatmulPrecision.medium
    """Of the Newton-Schulz steps; medium (bf16) is fast on accelerators and accurate enough."""
    tp_mode: MuonTensorParallel = MuonTensorParallel.blockwise
    """blockwise: each rank its own slice, cheapest, but another update at every parallel.tp;
    duplicated: every rank gathers the whole; distributed: no rank does, more communication."""
    split_qkv: bool = True
    """Orthogonalise query, key, value and gates of a fused projection each by itself."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer and its learning-rate schedule. The defaults follow the paper where it says."""

    name: OptimizerName = OptimizerName.adamw
    """adamw for everything; muon for hidden matrices, with AdamW for embeddings, the output
    projection, norms and sinks."""
    muon: MuonConfig = field(default_factory=MuonConfig)
    learning_rate: float = above_zero(default=3e-4)
    """Highest learning rate, reached at the end of the warm-up."""
    min_learning_rate: float = at_least(0, default=3e-5)
    """Learning rate at the end of the decay; a tenth of the highest is customary."""
    beta1: float = fraction(default=0.9)
    """Decay per step of the running mean of gradients."""
    beta2: float = fraction(default=0.95)
    """Decay per step of the running mean of squared gradients."""
    epsilon: float = above_zero(default=1e-8)
    """Added to the denominator of the update; PyTorch's default, the paper uses 1e-10."""
    weight_decay: float = at_least(0, default=0.1)
    """Decoupled weight decay; norms, biases and sinks are exempt."""
    clip_grad: float = at_least(0, default=1.0)
    """Largest global gradient norm; 0 turns clipping off."""
    schedule: Schedule = Schedule.wsd
    """wsd: warm-up, constant, linear decay; cosine: warm-up, cosine decay; constant: no decay."""
    warmup_steps: int = at_least(0, default=0)
    """Steps of linear warm-up from zero."""
    decay_steps: int | None = at_least(0, default=None)
    """Length of the decay in steps: of the final decay with wsd (null: a tenth of the run), from
    the end of the warm-up with cosine (null: until the end of the run)."""
    accept_schedule_change: bool = False
    """Go on, with a warning, though changed settings make the learning rate of a resumed run's next
    step another one."""

    def num_decay_steps(self, total_steps: int) -> int:
        """Length of the decay in a run of `total_steps`, with the default resolved."""
        if self.schedule is Schedule.constant:
            return 0
        if self.decay_steps is not None:
            return self.decay_steps
        wsd = self.schedule is Schedule.wsd
        return total_steps // 10 if wsd else max(total_steps - self.warmup_steps, 0)


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """Which steps are left out of training, and how many of them stop the run."""

    max_bad_steps: int = at_least(1, default=5)
    """Bad steps in a row (a loss or gradient that is not finite, or a spike) that stop the run with
    exit code 4: it will not recover by itself."""
    spike_window: int = at_least(0, default=64, most=100_000)
    """Good steps whose median a step is compared with, once there are so many; 0 finds no spikes,
    only what is not finite."""
    loss_spike: float = above_zero(default=3.0)
    """Loss, in medians, above which a step is left out; a loss seldom doubles without cause."""
    grad_norm_spike: float = above_zero(default=30.0)
    """Gradient norm, in medians, above which a step is left out; clipping takes care of less."""


OFFLOAD_MIN_BYTES = 2**20
"""Default of `train.offload_min_bytes`."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length and batches of the run."""

    steps: int = at_least(1)
    """Optimizer steps of the whole run, restarts included."""
    global_batch_size: int = at_least(1)
    """Sequences per optimizer step, over all ranks."""
    batch_ramp: list[int] | None = field(default=None, hash=False)
    """`[start,increment,samples]`: begin with `start` sequences a step and grow by `increment`, in
    equal parts of the first `samples` samples, to global_batch_size; null has that from the start.
    """
    micro_batch_size: int = at_least(1)
    """Sequences one data-parallel rank computes at a time."""
    seq_length: int = at_least(2)
    """Tokens per sequence."""
    seed: int = at_least(0, default=1234, most=2**63 - 1)
    """Seed of the initial weights, the data order and dropout."""
    precision: Precision = Precision.fp32
    """fp32 runs anywhere and is exact to compare; bf16 is for accelerators."""
    recompute: Recompute = Recompute.none
    """none keeps all activations, selective recomputes parts of layers, full whole layers."""
    recompute_modules: list[RecomputeModule] = field(
        default_factory=lambda: [RecomputeModule.attention], hash=False
    )
    """What selective recomputes: attention (from query, key and value to its output), norm (outputs
    of the layers' two norms), feed_forward (dense ones), experts (with router and shared expert).
    """
    recompute_layers: int | None = at_least(1, default=None)
    """Layers of every pipeline stage, the first ones, that full recomputes; null all of them."""
    offload_activations: bool = False
    """Keep what layers save for the backward pass in pinned host memory, copied beside computing;
    with recompute=full the layers' inputs. Pays where a layer computes longer than copies take."""
    offload_min_bytes: int = at_least(0, default=OFFLOAD_MIN_BYTES, most=2**63 - 1)
    """Smallest tensor, in bytes, that offload_activations copies; smaller ones cost more than they
    give back."""
    loss_chunk: int | None = at_least(1, default=None)
    """Tokens of a sequence, on one context-parallel rank, whose logits are made at a time, and made
    again in the backward pass, so that never all are there; null makes all at once."""
    eval_interval: int = at_least(0, default=0)
    """Steps between two evaluations; 0 evaluates only at the start and the end."""
    eval_batches: int = at_least(0, default=8)
    """Global batches per evaluation, the same ones every time, spread over the whole split; all of
    it where it holds no more. 0 never evaluates, and needs no validation split."""
    deadline_minutes: float | None = above_zero(default=None)
    """Minutes after which this start must have saved and ended, with exit code 3; null takes the
    end of the Slurm job, where there is one."""
    guard: GuardConfig = field(default_factory=GuardConfig)
    """Bad steps."""

    def recomputes(self, module: RecomputeModule) -> bool:
        """Whether this part alone is made again in the backward pass."""
        return self.recompute is Recompute.selective and module in self.recompute_modules

    def recomputes_layer(self, place: int) -> bool:
        """Whether all of a layer is, by its place from 0 in its pipeline stage."""
        layers = self.recompute_layers
        return self.recompute is Recompute.full and (layers is None or place < layers)

    @property
    def saves_weights_by_hooks(self) -> bool:
        """Whether what linear layers save goes through hooks of ours, their weights too.

        A weight that comes out of a hook has lost its attributes, by which a matrix product that
        adds to the sum of gradients would tell that it has.
        """
        whole = self.recompute is Recompute.full and self.recompute_layers is None
        return (self.offload_activations and not whole) or self.recomputes(RecomputeModule.norm)

    @property
    def recompute_text(self) -> str:
        """What is recomputed, in words."""
        if self.recompute is Recompute.selective:
            return f"selective ({', '.join(module.value for module in self.recompute_modules)})"
        if self.recompute_layers is not None:
            return f"{self.recompute.value} ({self.recompute_layers} layers a stage)"
        return self.recompute.value

    @property
    def num_eval_samples(self) -> int:
        """Sequences of an evaluation, over all ranks, at most."""
        return self.eval_batches * self.global_batch_size

    @property
    def ramp(self) -> BatchRamp | None:
        """`batch_ramp` by its names; None without one, or with one that `validate` refuses."""
        given = self.batch_ramp or []
        return BatchRamp(*given) if len(given) == 3 else None

    @property
    def tokens(self) -> int:
        """Trained on in the whole run."""
        return self.samples_of(self.steps) * self.seq_length

    def samples_of(self, steps: int, place: int = 0) -> int:
        """How many samples `steps` steps take that begin after `place` samples of the order."""
        if self.ramp is None:
            return steps * self.global_batch_size
        return self.ramp.samples_of(steps, place, self.global_batch_size)


VALIDATION = "validation"
"""Name of the evaluation on the run's own validation split."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the tokens come from. Without a path a small text that ships with us is used."""

    path: str | None = None
    """Text, JSON-lines or prepared dataset to train on; null uses the built-in sample text."""
    blend: str | None = None
    """Prepared datasets with weights, `0.7 data/web; 0.3 data/code`, in place of `path`."""
    skip_steps: str = ""
    """Steps whose samples are left out, like `1200-1210, 1300`: after a rewind from a spike."""
    tokenizer: str | None = None
    """Tokenizer file or directory; null trains one on the data and caches it."""
    tokenizer_vocab_size: int = at_least(1, default=4096)
    """Vocabulary of a tokenizer trained here, in token ids; small, for small models."""
    validation_fraction: float = 0.01
    """Share of the documents held out for evaluation, chosen by their texts; 0, for
    `train.eval_batches=0`, holds out none."""
    evaluation: dict[str, str] = field(default_factory=dict, hash=False)
    """Further evaluation sets, `{code: data/code}`: the validation splits of prepared datasets, or
    text, all of it, in the run's tokenizer, with rows and curves under their names."""
    text_key: str = "text"
    """Field of a JSON line that holds the document."""
    verify: bool = True
    """Compare large token files with their hashes beside training, on one rank of every machine at
    100 MB/s; small files and blocks of large ones always are, at the start."""
    document_mask: bool = False
    """Tokens see their own document alone: blocks and windows count from where it starts."""
    cache_dir: str = ".cache/data"
    """Where prepared datasets and tokenizers are kept between runs."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are written, kept and loaded."""

    interval: int = at_least(1, default=1000)
    """Steps between two checkpoints: what a killed run can lose."""
    keep: int = at_least(0, default=3)
    """Newest checkpoints that are kept; 0 keeps all."""
    keep_every: int = at_least(0, default=0)
    """Checkpoints after a multiple of so many steps are kept besides; 0 keeps none besides."""
    asynchronous: bool = True
    """Write files while training goes on. Takes host memory of the size of a rank's files."""
    load: str | None = None
    """Step or run directory whose weights a fresh run starts from, whatever its parallel sizes."""
    resume: bool = True
    """Continue from the newest valid checkpoint of the run directory, if there is one."""
    step: int | None = at_least(1, default=None)
    """Continue from (or load) the checkpoint after exactly this step; null takes the newest."""
    verify: bool = True
    """Compare the content of every file with its hash before loading; sizes always are."""
    accept_changed_data: bool = False
    """Go on, with a warning, though the data are not those that the checkpoint was trained on, or
    a set of `data.evaluation` is another, or `load` names weights of another tokenizer."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run."""

    name: str = "run"
    """Name of the run; letters, digits, dots, dashes and underscores."""
    run_dir: str | None = None
    """Directory of everything the run writes; null means `runs/<name>`."""
    model: ModelConfig
    train: TrainConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    debug: DebugConfig = field(default_factory=DebugConfig)

    @property
    def run_path(self) -> Path:
        """The run directory, with the default resolved."""
        return Path(self.run_dir) if self.run_dir else Path("runs") / self.name
