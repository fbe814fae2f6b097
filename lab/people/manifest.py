"""Rendered people as a data set to train on: each clip with photos out of the person's other clips."""

from __future__ import annotations

import json
from pathlib import Path

from mm_core.errors import SettingError
from mm_core.json_file import read_lines, read_object

from .captions import nod, smiles, tilt
from .scene import ClipDescription
from .shards import SETTINGS_FILE, write_whole
from .streams import stream

PICTURES_PER_CLIP = 1


def repeats_of(clip: ClipDescription) -> int:
    """1 to 9: movements that are small or seldom are shown more often, or they are learnt last."""
    return 1 + 3 * bool(nod(clip)) + bool(tilt(clip)) + 4 * smiles(clip)


def write_manifest(folder: Path, name: str, *, pictures: bool) -> int:
    """Write a manifest of the finished shards into their folder; returns the number of samples.

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
        lines += _samples(shard.name, clips, found["frames"], pictures)
    write_whole(folder / name, lambda file: file.write("".join(json.dumps(line) + "\n" for line in lines).encode()))
    return len(lines)


def _samples(shard: str, clips: list[dict], frames: int, pictures: bool) -> list[dict]:
    """Lines of a manifest for a shard with these clips; a person is all in one shard."""
    photos: dict[int, dict[int, str]] = {}
    for row, clip in enumerate(clips):
        person, number = clip["person"], clip["clip"]
        photo = stream("manifest photo", person, number).integers(frames)
        photos.setdefault(person, {})[number] = f"{shard}#{row}@{photo}"
    samples = []
    for row, clip in enumerate(clips):
        person, number = clip["person"], clip["clip"]
        sample = {
            "id": f"{person}-{number}",
            "media": f"{shard}#{row}",
            "caption": clip["caption"],
            "references": [photo for other, photo in photos[person].items() if other != number],
            "person": str(person),
            "repeat": 1 if pictures else repeats_of(ClipDescription.from_json(clip["description"])),
        }
        if not pictures:
            samples.append(sample)
            continue
        chosen = stream("manifest pictures", person, number).choice(frames, PICTURES_PER_CLIP, replace=False)
        for frame in sorted(int(value) for value in chosen):
            samples.append(sample | {"id": f"{person}-{number}-{frame}", "media": f"{shard}#{row}@{frame}"})
    return samples
