"""The layout of a data set: a folder with `manifest.jsonl`, a line a sample, and the files that it names."""

# {"id": "7-2", "media": "clips/7.mp4", "caption": "A man img reads.", "references": ["photos/7.jpg"], "person": "7"}

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from ..errors import CheckpointError, MagicMirrorError, SampleError, SettingError
from ..json_file import parse
from ..limits import MANIFEST_LINE_BYTES, NAME_LENGTH, REFERENCES
from ..names import is_below, stays_within
from ..picture_file import read_image
from ..video_reader import read_frames

MANIFEST = "manifest.jsonl"
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
VIDEOS = (".mp4", ".webm", ".mov", ".mkv")
_SOURCE = r"(?s)(?P<file>.+?)(?:@(?P<frame>[0-9]{1,9}))?"
_FIELDS = {
    "id": str, "media": str, "caption": str, "references": list, "person": str, "source": str, "licence": str,
}  # fmt: skip
_OPTIONAL = {"caption", "person", "source", "licence"}
_KINDS = {str: "a text", list: "a list", int: "a whole number"}


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a path of the manifest means: `photo.png`, `clip.mp4`, `clip.mp4@4`."""

    file: str
    """Relative to the manifest's folder."""
    frame: int | None
    """A single one of the clip, counted from 0; None: all of it."""

    @classmethod
    def parse(cls, path: str) -> Source:
        """Raises SettingError for a file of another kind, a clip or frame of what has none, and a path that leads out
        of the folder."""
        if not path:
            raise SettingError("a path is empty")
        match = re.fullmatch(_SOURCE, path[:NAME_LENGTH])
        if not match or not stays_within(match["file"]) or len(path) > NAME_LENGTH:
            raise SettingError(f"{path[:100]!r} leads out of the data set's folder, or is none; give a path below it")
        file, frame = match["file"], match["frame"]
        source = cls(file=file, frame=None if frame is None else int(frame))
        suffix = source.suffix
        if suffix not in (*PICTURES, *VIDEOS):
            raise SettingError(f"{path!r} is no {', '.join((*PICTURES, *VIDEOS))} file")
        if frame is not None and suffix in PICTURES:
            raise SettingError(f"{path!r}: a picture has no frames; leave out @{frame}")
        return source

    @property
    def suffix(self) -> str:
        return Path(self.file).suffix.lower()

    @property
    def is_picture(self) -> bool:
        """One frame, whatever it is taken from."""
        return self.suffix in PICTURES or self.frame is not None


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One line of a manifest."""

    id: str
    media: str
    caption: str
    """"" if there is none: `check_dataset` and `precompute` count such samples and leave them out."""
    references: tuple[str, ...]
    """Pictures of the person, 1 or more; the medium itself if it is a picture (self-reference)."""
    person: str | None
    source: str | None = None
    """Where the medium is from: a collection's name, an address."""
    licence: str | None = None


def manifest_path(data: Path) -> Path:
    """data: the folder of a data set, or one of several manifests in it. Raises SettingError if there is none."""
    path = data if data.suffix == ".jsonl" else data / MANIFEST
    if not path.is_file():
        raise SettingError(f"There is no {path}. A data set is a folder with {MANIFEST}; docs/training.md says more.")
    return path


def read_manifest(data: Path) -> list[Sample]:
    """The samples of a data set, in order. Files are not looked at.

    Raises SettingError, naming file and line, for the first line that is wrong, and for a manifest without samples.
    """
    path = manifest_path(data)
    samples = []
    for number, sample in parse_manifest(path):
        if isinstance(sample, SettingError):
            raise SettingError(f"{path}, line {number}: {sample}.") from sample
        samples.append(sample)
    if not samples:
        raise SettingError(f"{path} holds no sample; write a line for each.")
    return samples


def parse_manifest(path: Path) -> Iterator[tuple[int, Sample | SettingError]]:
    """Every line's number, from 1, and its sample, or what is wrong with it; empty lines are passed over."""
    lines: dict[str, int] = {}
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MANIFEST_LINE_BYTES + 1), b""), 1):
            if not line.strip():
                continue
            try:
                if len(line) > MANIFEST_LINE_BYTES:
                    raise SettingError(f"the line has more than {MANIFEST_LINE_BYTES:,} bytes; write one object a line")
                sample = _parse_line(line)
                first = lines.setdefault(sample.id, number)
                if first != number:
                    raise SettingError(f"the id {sample.id!r} is that of line {first} too; give each sample its own")
                yield number, sample
            except SettingError as error:
                yield number, error


def read_media(folder: Path, path: str, frames: int | None = None) -> np.ndarray:
    """A picture, clip or frame as (F, H, W, 3) uint8 RGB, F = 1 for a picture; the first `frames` of a longer clip.

    Raises SampleError: "missing file", "corrupt file" or "missing frame".
    """
    source = Source.parse(path)
    file = folder / source.file
    if not file.is_file():
        raise SampleError("missing file", f"there is no {file}; put it there, or take the sample out")
    if not is_below(file, folder):
        raise SampleError("link", f"{file} is a link out of {folder}; put the file itself there")
    try:
        if source.suffix in PICTURES:
            return read_image(file)[None]
        wanted = (source.frame, source.frame + 1) if source.frame is not None else (0, frames)
        clip = list(islice(read_frames(file), *wanted))
    except MagicMirrorError as error:
        raise SampleError("corrupt file", str(error)) from error
    if source.frame is not None and not clip:
        raise SampleError("missing frame", f"{path} ends before frame {source.frame}, counted from 0")
    if not clip:
        raise SampleError("corrupt file", f"{file} holds no frame. Make or copy the file again")
    return np.stack(clip)


def read_picture(folder: Path, path: str) -> np.ndarray:
    """A picture or a single frame as (H, W, 3) uint8 RGB. Raises as `read_media`."""
    if not Source.parse(path).is_picture:
        raise SampleError("no picture", f"{path} is a clip; name a frame of it, such as {path}@0")
    return read_media(folder, path)[0]


def check_length(frames: int, wanted: int, name: str) -> None:
    """Raises SampleError "too few frames"."""
    if frames < wanted:
        raise SampleError(
            "too few frames", f"{name} has {frames} frames, of {wanted} that are trained; use a longer one"
        )


def _parse_line(line: bytes) -> Sample:
    try:
        entry = parse(line.decode("utf-8"), "the line")
    except (UnicodeDecodeError, CheckpointError) as error:
        raise SettingError(f"this is no JSON ({error}); write one object a line, in UTF-8") from error
    if not isinstance(entry, dict):
        raise SettingError(f"this is no JSON object, but {str(entry)[:100]}")
    unknown = sorted(key[:40] for key in entry.keys() - _FIELDS)[:10]
    missing = sorted(_FIELDS.keys() - _OPTIONAL - entry.keys())
    if unknown or missing:
        wrong = [f"{what} {', '.join(n)}" for what, n in (("unknown", unknown), ("missing", missing)) if n]
        raise SettingError(f"{'; '.join(wrong)}. A sample has {', '.join(_FIELDS)}")
    for name, value in entry.items():
        if type(value) is not _FIELDS[name]:
            shown = type(value).__name__ if isinstance(value, (list, dict)) else repr(value)[:100]
            raise SettingError(f"{name} is {shown}; it must be {_KINDS[_FIELDS[name]]}")
    if not entry["id"]:
        raise SettingError("the id is empty; give each sample its own")
    if not entry["references"]:
        raise SettingError("references is empty; name at least one picture of the person (the medium, if it is one)")
    if len(entry["references"]) > REFERENCES:
        raise SettingError(f"references names {len(entry['references'])} pictures; it may name {REFERENCES}")
    Source.parse(entry["media"])
    for reference in entry["references"]:
        if not isinstance(reference, str) or not Source.parse(reference).is_picture:
            shown = str(reference)[:100]
            raise SettingError(f"the reference {shown!r} is no picture; of a clip, name a frame, as in clip.mp4@0")
    return Sample(
        id=entry["id"],
        media=entry["media"],
        caption=entry.get("caption", "").strip(),
        references=tuple(dict.fromkeys(entry["references"])),
        person=entry.get("person"),
        source=entry.get("source"),
        licence=entry.get("licence"),
    )
