"""Every setting of a run: its name, type and default, and why that default.

Sections are handed down one by one; nothing below `training` sees the whole tree. The members of
the enumerations are lower case because they are written in YAML and on the command line.
Fields without a default must be given by a preset or by the user.
"""

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from hysparse_megatron.config.batch_ramp import BatchRamp
from hysparse_megatron.config.cluster import ClusterConfig
from hysparse_megatron.config.rope import RopeScalingConfig


class GateKind(Enum):
    """Granularity of the two sigmoid gates of a sparse layer."""

    head = "head"
    channel = "channel"


class FullGate(Enum):
    """Sigmoid gate on the output of a full-attention layer (gated attention)."""

    none = "none"
    head = "head"
    channel = "channel"


class RouterScore(Enum):
    """How a router turns logits into the weights of the chosen experts."""

    softmax = "softmax"
    sigmoid = "sigmoid"


class Balancing(Enum):
    """What keeps the experts of a layer about equally busy."""

    none = "none"
    aux_loss = "aux_loss"
    sequence_aux_loss = "sequence_aux_loss"
    bias = "bias"


class SinkKind(Enum):
    """The learnable extra logit in the softmax of a sparse layer's two branches."""

    branch = "branch"
    shared = "shared"
    none = "none"


class Backend(Enum):
    """Which implementation of the attention math runs."""

    auto = "auto"
    reference = "reference"
    triton = "triton"


class Layers(Enum):
    """Whose linear layers, norms and experts are used."""

    auto = "auto"
    te = "te"
    local = "local"


class Fp8(Enum):
    """How linear layers scale what they compute in FP8: per tensor, or per block of 128."""

    none = "none"
    tensorwise = "tensorwise"
    blockwise = "blockwise"


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


class TrackingMode(Enum):
    """Where metrics go besides `metrics.jsonl`."""

    off = "off"
    offline = "offline"
    online = "online"


@dataclass(frozen=True, kw_only=True)
class MoeConfig:
    """Mixture of experts in the feed-forward layers; the paper gives 512 experts, 8 active."""

    num_experts: int = 0
    """Routed experts of every layer, of all expert-parallel ranks together; 0 makes it dense."""
    num_active_experts: int = 8
    """Experts that compute for each token (top-k), out of `num_experts`."""
    expert_ffn_hidden_size: int | None = None
    """Inner width of one expert, in channels; null means `model.ffn_hidden_size`."""
    shared_expert_ffn_hidden_size: int = 0
    """Inner width of an expert that sees every token; 0 for none, which fits the paper's counts."""
    num_dense_first_layers: int = 0
    """Layers at the start that stay dense, `model.ffn_hidden_size` wide; the paper names none."""
    router_score: RouterScore = RouterScore.softmax
    """softmax or sigmoid over the experts; the chosen weights are normalised to one either way."""
    router_scaling: float = 1.0
    """Factor on the normalised weights of the chosen experts; sigmoid routers often use 2.5."""
    balancing: Balancing = Balancing.aux_loss
    """aux_loss per micro-batch or per sequence; bias moves the choice with one learnt number per
    expert and needs sigmoid; none leaves the router alone. (megatron-core's loss over the global
    batch depends on the data-parallel size and is left out.)"""
    aux_loss_coefficient: float = 1e-3
    """Weight of the auxiliary loss in the total; unused with bias and none."""
    bias_update_rate: float = 1e-3
    """Step by which an expert's bias moves after every batch, with balancing = bias."""
    z_loss_coefficient: float = 0.0
    """Weight of the squared log-sum-exp of the router's logits (ST-MoE); 0 turns it off."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture. Baselines are other layouts of the same model."""

    layout: str
    """One letter per layer in the layout language: F full, S sparse, W window, `|` a cut."""
    hidden_size: int
    """Width of the residual stream, in channels."""
    ffn_hidden_size: int
    """Inner width of the gated feed-forward layer, in channels."""
    num_attention_heads: int
    """Query heads of every layer, of all tensor-parallel ranks together."""
    num_query_groups: int
    """Key and value heads; the query heads of one group share keys, values and indices."""
    head_dim: int
    """Channels of one query or key head."""
    value_head_dim: int | None = None
    """Channels of one value head; null means `head_dim`, as in the paper."""
    vocab_size: int | None = None
    """Number of token ids; null takes the tokenizer's, which is right unless weights are loaded."""
    block_size: int = 64
    """Tokens in one block that is scored and selected as a whole (the paper's B = 64)."""
    num_selected_blocks: int = 16
    """Blocks a query reads in a sparse layer (the paper's 1024 tokens / 64 = 16)."""
    window: int = 128
    """Tokens a query sees in the sliding window, itself included (the paper's w = 128)."""
    gate: GateKind = GateKind.head
    """One gate per head or per channel; the paper is silent, its parameter counts favour head."""
    sink: SinkKind = SinkKind.branch
    """One sink per head and branch, one shared by both branches, or none; the paper is silent."""
    full_gate: FullGate = FullGate.none
    """Gate on full layers' output; the paper's 80B full-attention baseline alone has one."""
    forced_first_blocks: int = 0
    """Blocks at the start that are always selected, out of `num_selected_blocks`; paper: none."""
    forced_recent_blocks: int = 0
    """Blocks up to the current one that are always selected; the paper forces none."""
    rotary_base: float = 10000.0
    """Base of the rotary position embedding; 640000 in the paper's 32k-token stage."""
    rotary_fraction: float = 1.0
    """Share of a head's channels that is rotated; the rest carries no position."""
    tie_embeddings: bool = False
    """Use the input embedding as the output projection; saves most parameters of small models."""
    qkv_bias: bool = False
    """Add a learnt bias to all that attention projects its input to: queries, keys and values, as
    in Qwen2, and gates; it begins at zero, and the paper mentions none."""
    qk_norm: bool = False
    """Normalise queries and keys per head before rotation; the paper does not mention it."""
    norm_epsilon: float = 1e-5
    """Added to the mean square inside RMSNorm."""
    init_std: float = 0.02
    """Standard deviation of the initial weights."""
    hidden_dropout: float = 0.0
    """Probability of dropping a channel after attention and feed-forward; 0 for one-epoch runs."""
    backend: Backend = Backend.auto
    """Attention implementation; auto picks by device and logs what it picked and why."""
    layers: Layers = Layers.auto
    """Linear layers, norms and experts; auto takes Transformer Engine where it is and can run."""
    fp8: Fp8 = Fp8.none
    """Matrix products of Transformer Engine's linear layers in FP8; attention stays in bf16."""
    rope_scaling: RopeScalingConfig = field(default_factory=RopeScalingConfig)
    moe: MoeConfig = field(default_factory=MoeConfig)

    @property
    def expert_width(self) -> int:
        """Inner width of one routed expert, with the default resolved."""
        width = self.moe.expert_ffn_hidden_size
        return self.ffn_hidden_size if width is None else width

    def is_moe_layer(self, layer: int) -> bool:
        """Whether the layer with this index from 0 has experts instead of a dense feed-forward."""
        return self.moe.num_experts > 0 and layer >= self.moe.num_dense_first_layers

    @property
    def value_dim(self) -> int:
        """Channels of one value head, with the default resolved."""
        return self.head_dim if self.value_head_dim is None else self.value_head_dim

    @property
    def rotary_dim(self) -> int:
        """Channels of one head that are rotated."""
        return round(self.head_dim * self.rotary_fraction)


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the model is split over ranks; what remains of the world size is data parallel."""

    tp: int = 1
    """Tensor-parallel size: ranks that share every layer's heads and feed-forward channels."""
    pp: int = 1
    """Pipeline-parallel size: ranks that hold different layers."""
    vpp: int | None = None
    """Model chunks per pipeline rank (interleaving, at least 2); null means one chunk."""
    cp: int = 1
    """Context-parallel size: ranks that share one sequence; only 1 in this version."""
    ep: int = 1
    """Expert-parallel size: ranks that share the experts of a layer; they are taken from the
    tensor- and data-parallel ranks of a stage, so they add nothing to the world size. An expert is
    never split."""
    sequence_parallel: bool = False
    """Also split the residual stream over the tensor-parallel ranks, along the sequence."""
    timeout_seconds: int = 600
    """How long ranks wait for each other, at the start and in every collective, before all of them
    end with an error."""
    setup_timeout_seconds: int = 3600
    """The same from the start until the first step is done: data may be prepared on one rank, and
    kernels compiled, while the others wait."""


@dataclass(frozen=True, kw_only=True)
class MuonConfig:
    """Muon, for the hidden matrices. The defaults are megatron-core's; AdamW ignores them."""

    momentum: float = 0.95
    """Decay per step of the running mean of gradients, the only state of a matrix."""
    nesterov: bool = False
    """Orthogonalise the running mean as it will be one step on, with the gradient in it twice."""
    num_ns_steps: int = 5
    """Newton-Schulz steps of an update; more bring its singular values closer to 1."""
    coefficients: MuonCoefficients = MuonCoefficients.quintic
    """Polynomials of these steps; quintic has five, and begins again after them."""
    scale_mode: MuonScale = MuonScale.spectral
    """spectral: square root of the longer side, so that entries are of order 1 like AdamW's;
    unit_rms_norm: square root of rows by columns; shape_scaling: the same, but at least 1."""
    extra_scale_factor: float = 1.0
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
    learning_rate: float = 3e-4
    """Highest learning rate, reached at the end of the warm-up."""
    min_learning_rate: float = 3e-5
    """Learning rate at the end of the decay; a tenth of the highest is customary."""
    beta1: float = 0.9
    """Decay per step of the running mean of gradients."""
    beta2: float = 0.95
    """Decay per step of the running mean of squared gradients."""
    epsilon: float = 1e-8
    """Added to the denominator of the update; PyTorch's default, the paper uses 1e-10."""
    weight_decay: float = 0.1
    """Decoupled weight decay; norms, biases and sinks are exempt."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    schedule: Schedule = Schedule.wsd
    """wsd: warm-up, constant, linear decay; cosine: warm-up, cosine decay; constant: no decay."""
    warmup_steps: int = 0
    """Steps of linear warm-up from zero."""
    decay_steps: int | None = None
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

    max_bad_steps: int = 5
    """Bad steps in a row (a loss or gradient that is not finite, or a spike) that stop the run with
    exit code 4: it will not recover by itself."""
    spike_window: int = 64
    """Good steps whose median a step is compared with, once there are so many; 0 finds no spikes,
    only what is not finite."""
    loss_spike: float = 3.0
    """Loss, in medians, above which a step is left out; a loss seldom doubles without cause."""
    grad_norm_spike: float = 30.0
    """Gradient norm, in medians, above which a step is left out; clipping takes care of less."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length and batches of the run."""

    steps: int
    """Optimizer steps of the whole run, restarts included."""
    global_batch_size: int
    """Sequences per optimizer step, over all ranks."""
    batch_ramp: list[int] | None = field(default=None, hash=False)
    """`[start,increment,samples]`: begin with `start` sequences a step and grow by `increment`, in
    equal parts of the first `samples` samples, to global_batch_size; null has that from the start.
    """
    micro_batch_size: int
    """Sequences one data-parallel rank computes at a time."""
    seq_length: int
    """Tokens per sequence."""
    seed: int = 1234
    """Seed of the initial weights, the data order and dropout."""
    precision: Precision = Precision.fp32
    """fp32 runs anywhere and is exact to compare; bf16 is for accelerators."""
    recompute: Recompute = Recompute.none
    """none keeps all activations, selective recomputes attention only, full whole layers."""
    eval_interval: int = 0
    """Steps between two evaluations; 0 evaluates only at the start and the end."""
    eval_batches: int = 8
    """Global batches per evaluation, the same ones every time, spread over the whole split; all of
    it where it holds no more. 0 never evaluates, and needs no validation split."""
    deadline_minutes: float | None = None
    """Minutes after which this start must have saved and ended, with exit code 3; null takes the
    end of the Slurm job, where there is one."""
    guard: GuardConfig = field(default_factory=GuardConfig)
    """Bad steps."""

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
    tokenizer_vocab_size: int = 4096
    """Vocabulary of a tokenizer trained here, in token ids; small, for small models."""
    validation_fraction: float = 0.05
    """Share of the documents held out for evaluation; 0, for `train.eval_batches=0`, holds out
    none."""
    evaluation: dict[str, str] = field(default_factory=dict, hash=False)
    """Further evaluation sets, `{code: data/code}`: names and paths like `path`, each evaluated on
    its own validation split in the run's tokenizer, with rows and curves under its name."""
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

    interval: int = 1000
    """Steps between two checkpoints: what a killed run can lose."""
    keep: int = 3
    """Newest checkpoints that are kept; 0 keeps all."""
    keep_every: int = 0
    """Checkpoints after a multiple of so many steps are kept besides; 0 keeps none besides."""
    asynchronous: bool = True
    """Write files while training goes on. Takes host memory of the size of a rank's files."""
    load: str | None = None
    """Step or run directory whose weights a fresh run starts from, whatever its parallel sizes."""
    resume: bool = True
    """Continue from the newest valid checkpoint of the run directory, if there is one."""
    step: int | None = None
    """Continue from (or load) the checkpoint after exactly this step; null takes the newest."""
    verify: bool = True
    """Compare the content of every file with its hash before loading; sizes always are."""
    accept_changed_data: bool = False
    """Go on, with a warning, though the data are not those that the checkpoint was trained on."""


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """What is measured, and where it goes besides `metrics.jsonl`, which is the source of truth."""

    log_interval: int | None = None
    """Steps between two lines on the console; `metrics.jsonl` has every step. null: 1 in runs of up
    to 1,000 steps, 10 up to 100,000, then 100, so that a log stays one that can be read."""
    straggler_interval: int = 50
    """Steps between two looks at what each rank measured, one small all-gather: the time of its own
    forward passes, its memory."""
    straggler_factor: float = 1.5
    """A rank is named as slow when it takes more than so many times the median of its pipeline
    stage; the ranks of a stage do the same work, so that smaller differences are noise."""
    architecture: bool = True
    """Let evaluations also measure selections, gates and sinks, on one micro-batch of theirs."""

    mode: TrackingMode = TrackingMode.off
    """off, offline (files to sync later) or online; a failing tracker never stops a run."""
    project: str = "hysparse"
    """Project the run appears in."""
    entity: str | None = None
    """Team or user; null takes the account's default."""
    name: str | None = None
    """Name shown in the tracker; null takes the run's."""
    group: str | None = None
    """Runs with the same group are shown together, such as those of a sweep."""
    tags: str = ""
    """Labels of the run in the tracker, separated by spaces (or commas, where they are quoted)."""
    tensorboard: bool = False
    """Write RUN_DIR/tensorboard too, with W&B or without; needs the extra `tensorboard`."""

    def steps_between_lines(self, total_steps: int) -> int:
        """`log_interval` in a run of `total_steps`, with the default resolved."""
        if self.log_interval is not None:
            return self.log_interval
        return 1 if total_steps <= 1000 else 10 if total_steps <= 100_000 else 100

    @property
    def tag_list(self) -> list[str]:
        """`tags`, one by one."""
        return self.tags.replace(",", " ").split()


@dataclass(frozen=True, kw_only=True)
class DebugConfig:
    """What helps to find a fault and costs something; all off in a normal run."""

    detect_anomaly: bool = False
    """Let autograd name the forward operation behind a NaN gradient; several times slower."""
    log_sample_ids: bool = False
    """Write the ids of every step's samples into `metrics.jsonl`, not only of skipped steps."""


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
