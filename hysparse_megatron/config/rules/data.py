"""Rules of the data, as far as they can be read off the settings."""

import re
from collections.abc import Iterator

from hysparse_megatron.config.blend import parse_blend
from hysparse_megatron.config.schema import VALIDATION, Config
from hysparse_megatron.config.skips import Skips
from hysparse_megatron.errors import Problem


def data(config: Config) -> Iterator[Problem]:
    """Blends and skips that can be read; whether the datasets are there is found out later."""
    data = config.data
    if data.blend is not None:
        try:
            parse_blend(data.blend)
        except ValueError as error:
            yield Problem("data.blend", data.blend, f"weights and paths: {error}")
        for key in ("path", "tokenizer"):
            value = getattr(data, key)
            if value is not None:
                yield Problem(f"data.{key}", value, "null with data.blend: its datasets have both")
    for name in data.evaluation:
        if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII) or name == VALIDATION:
            allowed = f"names of letters, digits and underscores, other than {VALIDATION}"
            yield Problem("data.evaluation", repr(name), allowed)
    if data.evaluation and config.train.eval_batches == 0:
        names = ", ".join(data.evaluation)
        yield Problem("data.evaluation", names, "nothing with train.eval_batches=0")
    try:
        Skips.parse(data.skip_steps)
    except ValueError as error:
        yield Problem("data.skip_steps", data.skip_steps, f"ascending steps: {error}")


def validation_fraction(config: Config) -> Iterator[Problem]:
    """What is held out, or nothing where nothing is evaluated."""
    held_out = config.data.validation_fraction
    if not (0 < held_out < 1 or held_out == config.train.eval_batches == 0):
        allowed = "above 0 and below 1; 0 with train.eval_batches=0"
        yield Problem("data.validation_fraction", str(held_out), allowed)
