"""A tiny case of the step benchmark, and answers of a process that measured one."""

from typing import Any

MINI = "--model hysparse_80b_a3b_mini --vocab 256 --lengths 64 --device cpu"


def answered(seconds: list[float], **more: Any) -> dict[str, Any]:
    return {"step_seconds": seconds, "losses": [1.0], "memory": None, **more}
