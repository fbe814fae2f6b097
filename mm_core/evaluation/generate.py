"""The clips of a benchmark by one system, shared by all processes; killed at any moment, the same call goes on."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..errors import SettingError
from ..files import write_json
from ..json_file import read_object
from ..video import write_video
from .benchmark_set import Entry
from .systems import Make, Request, Size

VIDEOS, COSTS, RUN = "videos", "costs", "run.json"
_UNCOUNTED = ("cpu", "mps")


def generate(
    entries: Sequence[Entry],
    load: Callable[[], Make],
    out: Path,
    *,
    size: Size,
    seed: int,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    on_clip: Callable[[int, int], None] = lambda done, of: None,
) -> None:
    """Write this process's share of the clips, by number, to `<out>/videos`, and what each cost to `<out>/costs`.

    Clips that are there are kept. load: reads the weights, if there is something to make. seed: of the first clip; each
    has its own. on_clip: is told how many are done, of how many.

    Raises SettingError for a clip that is there of other photos, or of another prompt.
    """
    share = list(enumerate(entries))[rank::world_size]
    todo = []
    for number, entry in share:
        if not clip_of(out, entry).is_file():
            todo.append((number, entry))
        elif read_object(out / COSTS / f"{entry.name}.json").get("made of") != _made_of(entry):
            raise SettingError(
                f"{clip_of(out, entry)} is not of the photos and the prompt that {entry.person} has now: remove it, or "
                "choose another folder"
            )
    on_clip(len(share) - len(todo), len(share))
    make = load() if todo else None
    for done, (number, entry) in enumerate(todo, len(share) - len(todo) + 1):
        request = Request(prompt=entry.prompt, photos=entry.photos, seed=seed + number, size=size)
        start = _start(device)
        frames, fps = make(request)
        cost = {"seconds": round(time.perf_counter() - start, 3), "gib": round(_peak(device) / 2**30, 3)}
        shape = {"frames": len(frames), "height": frames.shape[1], "width": frames.shape[2]}
        note = cost | shape | {"device": _name(device), "made of": _made_of(entry)}
        write_json(out / COSTS / f"{entry.name}.json", note)  # before the clip
        write_video(clip_of(out, entry), frames, fps)
        on_clip(done, len(share))


def clip_of(out: Path, entry: Entry) -> Path:
    """Where a clip is, or will be."""
    return out / VIDEOS / f"{entry.name}.mp4"


def _made_of(entry: Entry) -> str:
    """A hash of prompt and photos."""
    photos = [hashlib.sha256(path.read_bytes()).hexdigest() for path in entry.photos]
    return hashlib.sha256("\n".join([entry.prompt, *photos]).encode()).hexdigest()


def check_run(out: Path, settings: dict[str, Any], size: Size, seed: int) -> None:
    """Note what the clips of a folder are made with; raise SettingError where clips are there of something else."""
    wanted = settings | asdict(size) | {"seed": seed}
    check_made_with(out / RUN, wanted, "clips", begun=any((out / VIDEOS).glob("*")))


def check_made_with(note: Path, wanted: dict[str, Any], what: str, *, begun: bool) -> None:
    """Note what something in the note's folder is made with; raise SettingError where it is begun with something else.

    what: in the plural, for the message.
    """
    if not begun:
        write_json(note, wanted)
    known = read_object(note)
    differ = [name for name in wanted if known.get(name) != wanted[name]]
    if differ:
        there = ", ".join(f"{name} {known.get(name)}, not {wanted[name]}" for name in differ)
        raise SettingError(f"{note.parent} holds {what} made with {there}: use these, or another folder")


def _start(device: torch.device) -> float:
    if device.type not in _UNCOUNTED:
        torch.get_device_module(device).reset_peak_memory_stats(device)
    return time.perf_counter()


def _peak(device: torch.device) -> int:
    """Bytes: the most on the device since the start; where torch does not count, what the process holds now."""
    if device.type not in _UNCOUNTED:
        return torch.get_device_module(device).max_memory_allocated(device)
    import psutil

    return psutil.Process().memory_info().rss


def _name(device: torch.device) -> str:
    return device.type if device.type in _UNCOUNTED else torch.get_device_module(device).get_device_name(device)
