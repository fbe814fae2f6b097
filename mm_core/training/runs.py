"""The folder of a training run: its checkpoints, settings and measurements."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, SettingError
from ..files import write_bytes
from ..json_file import parse_object, read_object

CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"
SETTINGS = "settings.json"
_STEP = r"step-(\d{8})$"
_FREE = {"log_every", "save_every", "keep", "validate_every", "compile", "micro_batch", "workers"}
"""Settings that may change between two starts of a run: they do not change its numbers."""
_REMEDIES = {"learning_rate", "final_learning_rate", "skip_steps"}
"""Settings that may change as well, since they are what helps a run that cannot go on."""


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
    """A folder holds one run. Raises SettingError if it holds one with other settings; names that an older version did
    not write are not compared."""
    path = folder / SETTINGS
    if not path.is_file():
        return
    try:
        found = read_object(path)
    except CheckpointError as error:
        raise SettingError(
            f"{error} It tells which run the folder holds: remove the file if that is the run to go on with."
        ) from error
    wanted = json.loads(json.dumps(wanted))
    compared = wanted.keys() & found.keys() - _FREE - _REMEDIES
    differing = [name for name in wanted if name in compared and found[name] != wanted[name]]
    if differing:
        name = differing[0]
        raise SettingError(
            f"{folder} holds a run with {name} {str(found[name])[:100]}, not {wanted[name]}: use another folder, "
            "or the same setting to go on."
        )


def forget_after(path: Path, step: int) -> None:
    """Drop what a killed run measured after its last checkpoint: it will be measured again.

    Raises SettingError for a line that is damaged; the last one may be cut short, by the kill.
    """
    if not path.is_file():
        return
    lines = path.read_bytes().splitlines()
    steps = [_step_in(line) for line in lines]
    for number, found in enumerate(steps[:-1], 1):
        if found is None:
            raise SettingError(f"{path} is damaged in line {number}: it must be a JSON object with `step`. Remove it.")
    kept = [line for line, found in zip(lines, steps) if found is not None and found <= step]
    write_bytes(path, b"".join(line + b"\n" for line in kept))


def _step_in(line: bytes) -> int | None:
    """The step of a line of measurements; None for one that is damaged."""
    try:
        step = parse_object(line.decode("utf-8"), "a line").get("step")
    except (UnicodeDecodeError, CheckpointError):
        return None
    return step if type(step) is int else None
