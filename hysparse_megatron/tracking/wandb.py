"""Weights & Biases beside `metrics.jsonl`; whatever goes wrong here never stops a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, cast

from hysparse_megatron.config.schema import TrackingConfig, TrackingMode
from hysparse_megatron.tracking.metrics import chart_values, sample_html

SECONDS_TO_FINISH = 40
"""For what is not uploaded yet: less than launchers leave a rank that outlives the others."""


class Tracker:
    """Sends rows to W&B, or does nothing when tracking is off or has failed."""

    def __init__(
        self,
        tracking: TrackingConfig,
        run_id: str,
        name: str,
        directory: Path,
        config: dict[str, Any],
        warn: Callable[[str], None],
    ) -> None:
        """Start, or with the same `run_id` continue, a run; online falls back to offline."""
        self._run: Any = None
        self._warn = warn
        self._directory = directory
        if tracking.mode is TrackingMode.off:
            return
        modes = ["online", "offline"] if tracking.mode is TrackingMode.online else ["offline"]
        for mode in modes:
            try:
                self._run = _start(tracking, mode, run_id, name, directory, config)
            except Exception as error:
                warn(f"W&B did not start {mode}: {error}")
                continue
            if mode == "offline":
                warn(f"W&B is offline; upload later with: wandb sync {self._run_directory()}")
            return

    def log(self, row: dict[str, Any]) -> None:
        """Send one row, its keys under `train/` or `eval/`, stepped by our own `train/step`."""
        if self._run is None:
            return
        try:
            self._run.log({**chart_values(row), **_panels(row), "train/step": row["step"]})
        except Exception as error:
            self._warn(
                f"W&B stopped: {error}. Training goes on, metrics.jsonl is complete; upload what "
                f"was kept with: wandb sync {self._run_directory()}"
            )
            self._run = None

    def close(self, exit_code: int) -> None:
        """Finish the run, in `SECONDS_TO_FINISH` at most."""
        if self._run is not None:
            try:
                self._run.finish(exit_code=exit_code)
            except Exception as error:
                why = str(error).rstrip(".")
                self._warn(
                    f"W&B did not finish: {why}. Upload what was kept with: "
                    f"wandb sync {self._run_directory()}"
                )
            self._run = None

    def _run_directory(self) -> Path:
        return Path(getattr(self._run, "dir", None) or self._directory / "wandb").parent


def _panels(row: dict[str, Any]) -> dict[str, Any]:
    """What is shown in panels of their own."""
    if "sample" not in row:
        return {}
    import wandb

    return {"eval/sample": wandb.Html(sample_html(row))}


def _start(
    tracking: TrackingConfig,
    mode: str,
    run_id: str,
    name: str,
    directory: Path,
    config: dict[str, Any],
) -> Any:
    import wandb

    run = wandb.init(
        project=tracking.project,
        entity=tracking.entity,
        name=tracking.name or name,
        group=tracking.group,
        tags=tracking.tag_list,
        id=run_id,
        resume="allow",
        dir=str(directory),
        mode=cast(Literal["online", "offline"], mode),
        config=config,
        settings=wandb.Settings(
            init_timeout=30,
            finish_timeout=SECONDS_TO_FINISH,
            finish_timeout_raises=True,
            silent=True,
        ),
    )
    run.define_metric("train/step")
    run.define_metric("*", step_metric="train/step")
    return run
