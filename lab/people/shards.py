"""Rendered clips on disk: shards of some people each, written whole or not at all, by several processes.

A shard is `people-<first>-<stop>.npz` with `frames`, (clips, F, H, W, 3) uint8, and beside it a `.jsonl` with one line
a clip in the same order: person, clip, caption, description. The npz is written last: a shard is finished when it is
there.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import numpy as np

from mm_core.errors import MagicMirrorError, SettingError
from mm_core.files import PARTIAL, atomic_write, write_json, write_lines
from mm_core.json_file import read_lines, read_object

from .captions import caption
from .npz import read_frames_array
from .person import Person
from .render import render_clip
from .scene import ClipDescription, sample_clip
from .traits import HELD_OUT

SETTINGS_FILE = "settings.json"
PEOPLE_PER_SHARD = 16
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class RenderSettings:
    """first, stop: seeds of the people, stop excluded. clips: of each. frames: 8N + 1. size: pixels."""

    first: int
    stop: int
    clips: int
    frames: int = 9
    size: int = 64

    def __post_init__(self) -> None:
        if not 0 <= self.first < self.stop:
            raise SettingError(f"people {self.first}:{self.stop} are none: give first:stop with 0 <= first < stop")
        if self.first < HELD_OUT < self.stop:
            raise SettingError(
                f"people {self.first}:{self.stop} reach over {HELD_OUT}: from there on they are for evaluation only"
            )
        if self.clips < 1:
            raise SettingError(f"{self.clips} clips a person: give 1 or more")
        if self.frames < 9 or self.frames % 8 != 1:
            raise SettingError(f"{self.frames} frames: video VAEs keep 8N + 1, give 9, 17, 25 ...")
        if self.size < 16 or self.size % 8:
            raise SettingError(f"{self.size} pixels: give a multiple of 8 from 16 on")

    @property
    def held_out(self) -> bool:
        """Whether these people are for evaluation."""
        return self.first >= HELD_OUT


@dataclass(frozen=True, kw_only=True)
class ShardTask:
    """One shard to write: the people first..stop of a folder's settings."""

    folder: Path
    first: int
    stop: int
    settings: RenderSettings

    @property
    def path(self) -> Path:
        return self.folder / f"people-{self.first:08d}-{self.stop:08d}.npz"


@dataclass(frozen=True, kw_only=True, eq=False)
class RenderedClip:
    """frames: (F, H, W, 3) uint8 RGB."""

    frames: np.ndarray
    caption: str
    description: ClipDescription


def render_dataset(
    folder: Path,
    settings: RenderSettings,
    processes: int,
    on_shard: Callable[[int, int], None] | None = None,
) -> None:
    """Write all shards that are missing; what is written does not depend on the number of processes.

    One run at a time in a folder.
    on_shard(people, new): called for each finished shard, first for those that were there (new = 0).
    """
    folder.mkdir(parents=True, exist_ok=True)
    _check_settings(folder, settings)
    for left_by_a_killed_run in folder.glob(f".*{PARTIAL}"):
        left_by_a_killed_run.unlink()
    tasks = shard_tasks(folder, settings)
    missing = [task for task in tasks if not task.path.is_file()]
    report = on_shard or (lambda people, new: None)
    report(sum(task.stop - task.first for task in tasks if task not in missing), 0)
    if processes <= 1 or len(missing) <= 1:
        for task in missing:
            report(write_shard(task), 1)
        return
    # Spawned, not forked: OpenCV's and numba's threads do not survive a fork.
    pool = ProcessPoolExecutor(
        min(processes, len(missing)), mp_context=multiprocessing.get_context("spawn"), initializer=_start_worker
    )
    try:
        for done in as_completed([pool.submit(write_shard, task) for task in missing]):
            report(done.result(), 1)
    except BrokenProcessPool as error:
        raise MagicMirrorError(
            f"a worker process was killed, perhaps for lack of memory; run the same again with fewer than {processes} "
            "processes, it continues"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def shard_tasks(folder: Path, settings: RenderSettings) -> list[ShardTask]:
    """Shards begin at multiples of PEOPLE_PER_SHARD, so that a longer range has the same ones."""
    second = (settings.first // PEOPLE_PER_SHARD + 1) * PEOPLE_PER_SHARD
    starts = [settings.first, *range(second, settings.stop, PEOPLE_PER_SHARD)]
    stops = [*starts[1:], settings.stop]
    return [ShardTask(folder=folder, first=first, stop=stop, settings=settings) for first, stop in zip(starts, stops)]


def write_shard(task: ShardTask) -> int:
    """Render one shard and put it in its place; returns the number of people."""
    settings, frames, lines = task.settings, [], []
    for seed in range(task.first, task.stop):
        person = Person.from_seed(seed)
        for number in range(settings.clips):
            clip = sample_clip(seed, number, settings.frames, settings.size)
            frames.append(render_clip(person, clip))
            entry = {"person": seed, "clip": number, "caption": caption(clip), "description": clip.to_json()}
            lines.append(entry)
    write_lines(task.path.with_suffix(".jsonl"), lines)
    with atomic_write(task.path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, frames=np.stack(frames))
    return task.stop - task.first


def read_clips(folder: Path) -> Iterator[RenderedClip]:
    """All clips of the finished shards, by person and clip."""
    if not (folder / SETTINGS_FILE).is_file():
        raise SettingError(f"{folder} holds no rendered people: it has no {SETTINGS_FILE}")
    for path in sorted(folder.glob("people-*.npz")):
        frames = read_frames_array(path)
        entries = read_lines(path.with_suffix(".jsonl"))
        for clip_frames, entry in zip(frames, entries, strict=True):
            yield RenderedClip(
                frames=clip_frames,
                caption=entry["caption"],
                description=ClipDescription.from_json(entry["description"]),
            )


def _check_settings(folder: Path, settings: RenderSettings) -> None:
    """A folder holds clips of one kind; only the end of the range may grow."""
    path = folder / SETTINGS_FILE
    wanted = {"format": FORMAT, **asdict(settings)}
    if path.is_file():
        found = read_object(path)
        differing = [name for name in wanted if name != "stop" and found.get(name) != wanted[name]]
        if differing:
            name = differing[0]
            raise SettingError(f"{folder} was rendered with {name} {found.get(name)}, not {wanted[name]}: use another")
        if settings.stop < found["stop"]:
            raise SettingError(f"{folder} is of people up to {found['stop']}, not {settings.stop}: use another folder")
        if settings.stop > found["stop"] and found["stop"] % PEOPLE_PER_SHARD:
            raise SettingError(
                f"{folder} ends at {found['stop']}, inside a shard, and cannot grow: use another folder, "
                f"and an end that is a multiple of {PEOPLE_PER_SHARD}"
            )
    write_json(path, wanted)


def _start_worker() -> None:
    cv2.setNumThreads(1)
