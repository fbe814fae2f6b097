"""The folder of a training run: its checkpoints, settings and measurements."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import SettingError

CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"
SETTINGS = "settings.json"
_STEP = r"step-(\d{8})$"
_FREE = {"log_every", "save_every", "keep", "validate_every", "compile", "micro_batch"}
"""Settings that may change between two starts of a run: they do not change its numbers."""


def checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first."""
    return sorted(path for path in (folder / CHECKPOINTS).glob("step-*") if re.search(_STEP, path.name))


def latest_checkpoint(folder: Path) -> Path | None:
    found = checkpoints(folder)
    return found[-1] if found else None


def step_of(checkpoint: Path) -> int:
    """Steps done when it was written."""
    return int(re.search(_STEP, checkpoint.name).group(1))


def is_finished(folder: Path, steps: int) -> bool:
    """Whether the run in the folder has done so many steps."""
    last = latest_checkpoint(folder)
    return last is not None and step_of(last) >= steps


def checkpoint_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is, or will be."""
    return folder / CHECKPOINTS / f"step-{step:08d}"


def check_settings(folder: Path, wanted: Mapping[str, Any]) -> None:
    """A folder holds one run. Raises SettingError if it holds one with other settings."""
    path = folder / SETTINGS
    if not path.is_file():
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    wanted = json.loads(json.dumps(wanted))
    differing = [name for name in wanted if name not in _FREE and found.get(name) != wanted[name]]
    if differing:
        name = differing[0]
        raise SettingError(
            f"{folder} holds a run with {name} {found.get(name)}, not {wanted[name]}: use another folder, or the same "
            "setting to go on."
        )


def forget_after(path: Path, step: int) -> None:
    """Drop what a killed run measured after its last checkpoint: it will be measured again."""
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if _step_in(line) <= step]
    path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


def _step_in(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except ValueError:  # a line that the kill cut short
        return math.inf
