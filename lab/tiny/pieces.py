"""The small model in pieces, on machines that are lent for minutes: all that a piece goes on from, in one file.

That is, of the part in training its newest checkpoint, and of finished ones the weights that others still read. What is
rendered, detected, encoded and precomputed is made again: it follows from seeds and weights.
"""

from __future__ import annotations

import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory

from mm_core.errors import CheckpointError, MagicMirrorError
from mm_core.files import atomic_write
from mm_core.json_file import read_object
from mm_core.training.adapter_task import ADAPTER_FILE
from mm_core.training.runs import (
    CHECKPOINTS,
    METRICS,
    SETTINGS,
    checkpoint_of,
    is_finished,
    latest_checkpoint,
    step_of,
)
from mm_core.training.saved_state import AVERAGE, STATE, TRAINABLE

FOLLOWED_BY = {
    "vae/pictures": "vae/clips", "vae/clips": "vae/decoder",
    "text-to-video/text": "text-to-video/pictures", "text-to-video/pictures": "text-to-video/clips",
    "adapter/image": "adapter/video", "adapter/video": "sampled/video",
}  # fmt: skip
"""Trainings whose weights nothing reads once the second one is finished."""
_OF_TRAINING = (TRAINABLE, AVERAGE, STATE, "optimizer", "random_states")
"""How the names of those files begin that only going on needs. The others are what a task exports."""


def write_state(folder: Path, file: Path, limit: float) -> None:
    """Write the state of a run of the recipe, whole or not at all, as a tar archive.

    Raises MagicMirrorError where it has more than `limit` MiB; the file before it then stays.
    """
    with atomic_write(file) as temporary:
        with tarfile.open(temporary, "w") as archive:
            for run in sorted(path.parent for path in folder.rglob(CHECKPOINTS)):
                for path in _needed(folder, run):
                    archive.add(path, path.relative_to(folder), recursive=False)
        size = temporary.stat().st_size / 2**20
        if size > limit:
            raise MagicMirrorError(
                f"{file} would have {size:.1f} MiB, more than --limit {limit:g}, and was not written: give a higher "
                f"--limit or a smaller --width, or go on in {folder}, which has all of it."
            )


def _needed(folder: Path, run: Path) -> list[Path]:
    last = latest_checkpoint(run)
    if last is None:
        return []
    kept = [path for path in (run / SETTINGS, run / METRICS) if path.is_file()] + [last]
    name = run.relative_to(folder).as_posix()
    if name in FOLLOWED_BY and _is_finished(folder / FOLLOWED_BY[name]):
        return kept
    finished = _is_finished(run)
    for path in sorted(path for path in last.rglob("*") if path.is_file()):
        of_training = path.name.startswith(_OF_TRAINING)
        # The average of an adapter's weights is what its task exported, and is saved once.
        if of_training != finished or path.name == ADAPTER_FILE:
            kept.append(path)
    return kept


def _is_finished(run: Path) -> bool:
    return (run / SETTINGS).is_file() and is_finished(run, read_object(run / SETTINGS)["steps"])


def read_state(file: Path, folder: Path) -> None:
    """Put what `write_state` wrote, if the file is there, into a run's folder; where that is further, it stays.

    Raises CheckpointError for a file that is damaged.
    """
    if not file.is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent) as temporary:
        try:
            with tarfile.open(file) as archive:
                archive.extractall(temporary, filter="data")
        except tarfile.TarError as error:
            raise CheckpointError(f"{file} cannot be read ({error}): copy it again.") from error
        for found in list(Path(temporary).rglob("step-*")):
            source = found.parents[1]
            run = folder / source.relative_to(temporary)
            last = latest_checkpoint(run)
            if last is not None and step_of(last) >= step_of(found):
                continue
            (run / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
            for name in (SETTINGS, METRICS):
                if (source / name).is_file():
                    (source / name).replace(run / name)
            found.rename(checkpoint_of(run, step_of(found)))
