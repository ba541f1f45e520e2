"""Settings of what a run measures, and where it goes."""

from dataclasses import dataclass
from enum import Enum

from hysparse_megatron.architecture.bounds import above_zero, at_least


class TrackingMode(Enum):
    """Where metrics go besides `metrics.jsonl`."""

    off = "off"
    offline = "offline"
    online = "online"


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """What is measured, and where it goes besides `metrics.jsonl`, which is the source of truth."""

    log_interval: int | None = at_least(1, default=None)
    """Steps between two lines on the console; `metrics.jsonl` has every step. null: 1 in runs of up
    to 1,000 steps, 10 up to 100,000, then 100, so that a log stays one that can be read."""
    straggler_interval: int = at_least(1, default=50)
    """Steps between two looks at what each rank measured, one small all-gather: the time of its own
    forward passes, its memory."""
    straggler_factor: float = above_zero(default=1.5)
    """A rank is named as slow when it takes more than so many times the median of its pipeline
    stage; the ranks of a stage do the same work, so that smaller differences are noise."""
    architecture: bool = True
    """Let evaluations also measure selections, gates and sinks, on one micro-batch of theirs."""
    sample_tokens: int = at_least(0, default=0)
    """Tokens of text that the model writes after each evaluation on its own split, the likeliest
    each time, one forward pass over a short sequence each; fewer where `train.seq_length` or the
    document ends. 0 writes none."""
    sample_prompt: str | None = None
    """What that text goes on from; null takes the first 32 tokens that are held out."""

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
