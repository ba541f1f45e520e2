"""Rules of tracking, and where it finds its key."""

import importlib.metadata
import importlib.util
import netrc
import os
from collections.abc import Iterator

from hysparse_megatron.config.schema import Config
from hysparse_megatron.errors import Problem


def tensorboard(config: Config) -> Iterator[Problem]:
    """Its package, which is optional; asked for without importing it."""
    if config.tracking.tensorboard and importlib.util.find_spec("tensorboard") is None:
        got = "true (tensorboard not installed)"
        allowed = (
            "false, or true after: pip install tensorboard\n"
            "(the extra `tensorboard` of this package)"
        )
        yield Problem("tracking.tensorboard", got, allowed)


def sample(config: Config) -> Iterator[Problem]:
    """A prompt is for text that is written."""
    tracking = config.tracking
    if tracking.sample_prompt is not None and tracking.sample_tokens == 0:
        allowed = "null while tracking.sample_tokens = 0, which writes no text"
        yield Problem("tracking.sample_prompt", tracking.sample_prompt, allowed)


def has_wandb_key() -> bool:
    """Whether W&B would find a key on this machine."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False
