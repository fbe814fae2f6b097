"""Runs of the adapter's training, as several tests make and read them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from processes import run_two

from mm_core.training.config import TrainingConfig
from mm_core.training.runs import METRICS

HERE = Path(__file__).parent


def with_stage(config: TrainingConfig, stage: str = "video", **changes: object) -> TrainingConfig:
    return replace(config, **{stage: replace(getattr(config, stage), **changes)})


def losses(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / METRICS).read_text(encoding="utf-8").splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def train_on_two_processes(config: TrainingConfig, folder: Path, preparation: str = "") -> None:
    """The video stage in two processes. preparation: a line of Python that runs first in each."""
    script = folder.with_suffix(".py")
    script.write_text(
        f"import sys; from pathlib import Path; sys.path[:0] = {[str(HERE.parents[1]), str(HERE)]!r}\n"
        f"{preparation}\n"
        "from mm_core.training.config import *; from mm_core.training.loop import *\n"
        "from mm_core.training.adapter_task import AdapterTask\n"
        f"config = {config!r}\n"
        f"train(AdapterTask(config, 'video'), config.video.loop, Path({str(folder)!r}))\n"
        "from accelerate import PartialState; assert PartialState().num_processes == 2\n",
        encoding="utf-8",
    )
    run_two(str(script))
