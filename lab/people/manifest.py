"""Rendered people as a data set to train on: each clip with photos out of the person's other clips."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np

from mm_core.errors import SettingError
from mm_core.files import atomic_write, write_lines
from mm_core.json_file import read_lines, read_object

from .captions import nod, smiles, tilt
from .npz import read_frames_array
from .scene import ClipDescription
from .shards import SETTINGS_FILE
from .streams import stream

PICTURES_PER_CLIP = 1
FRAME_RATE = 8


def repeats_of(clip: ClipDescription) -> int:
    """1 to 9: movements that are small or seldom are shown more often, or they are learnt last."""
    return 1 + 3 * bool(nod(clip)) + bool(tilt(clip)) + 4 * smiles(clip)


def write_manifest(folder: Path, name: str, *, pictures: bool) -> int:
    """Write the clips of the finished shards, and a manifest of them, into their folder; returns the number of samples.

    The references of a clip are one frame of each of the person's other clips, so that no sample sees its own pixels.
    pictures: PICTURES_PER_CLIP single frames of each clip instead of the clip.

    Raises SettingError if there are no shards, or just one clip a person.
    """
    settings = folder / SETTINGS_FILE
    shards = sorted(folder.glob("people-*.npz"))
    if not settings.is_file() or not shards:
        raise SettingError(f"{folder} holds no rendered people: run the render command first")
    found = read_object(settings)
    if found["clips"] < 2:
        raise SettingError(f"{folder} has one clip a person: photos come from other clips, render 2 or more")
    lines = []
    for shard in shards:
        clips = read_lines(shard.with_suffix(".jsonl"))
        for frames, clip in zip(read_frames_array(shard), clips, strict=True):
            path = folder / _file(clip)
            if not path.is_file():
                write_lossless(path, frames)
        lines += _samples(clips, found["frames"], pictures)
    write_lines(folder / name, lines)
    return len(lines)


def write_lossless(path: Path, frames: np.ndarray) -> None:
    """Frames, (F, H, W, 3) uint8 RGB, as a video that gives them back bit for bit."""
    with atomic_write(path) as temporary, av.open(str(temporary), "w", format="matroska") as container:
        video = container.add_stream("ffv1", rate=FRAME_RATE)
        video.height, video.width = frames.shape[1:3]
        video.pix_fmt = "bgr0"
        for frame in frames:
            container.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(video.encode())


def _file(clip: dict) -> str:
    return f"clips/{clip['person']}-{clip['clip']}.mkv"


def _samples(clips: list[dict], frames: int, pictures: bool) -> list[dict]:
    """Lines of a manifest for these clips; a person is all in one shard."""
    photos: dict[int, dict[int, str]] = {}
    for clip in clips:
        person, number = clip["person"], clip["clip"]
        photo = stream("manifest photo", person, number).integers(frames)
        photos.setdefault(person, {})[number] = f"{_file(clip)}@{photo}"
    samples = []
    for clip in clips:
        person, number = clip["person"], clip["clip"]
        sample = {
            "id": f"{person}-{number}",
            "media": _file(clip),
            "caption": clip["caption"],
            "references": [photo for other, photo in photos[person].items() if other != number],
            "person": str(person),
        }
        if not pictures:
            samples.append(sample)
            continue
        chosen = stream("manifest pictures", person, number).choice(frames, PICTURES_PER_CLIP, replace=False)
        for frame in sorted(int(value) for value in chosen):
            samples.append(sample | {"id": f"{person}-{number}-{frame}", "media": f"{_file(clip)}@{frame}"})
    return samples
