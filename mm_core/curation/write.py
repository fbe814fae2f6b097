"""The files and the manifest of a training set, from the rows that are kept."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import MagicMirrorError
from ..files import write_bytes
from ..picture_file import decode_image
from ..video import write_video
from .clips import clip_frames
from .config import CurationConfig, Kind
from .items import Item, Shard, read
from .measure import Row
from .neighbours import cross_references
from .rules import marked, portrait_caption

_QUALITY = 95  # of JPEG, and of clips


def samples(
    kind: Kind, rows: Iterable[Row], all_rows: Sequence[Row], config: CurationConfig
) -> Iterator[dict[str, Any]]:
    """Lines of the manifest, in the order of the rows. all_rows: the same once more, of which only what names files and
    compares clips is looked at."""
    found, people = cross_references(all_rows, config.keep) if kind == "video" else ([], [])
    for at, row in enumerate(rows):
        media = media_path(kind, row, config)
        line = {"id": row["id"], "media": media, "caption": caption_of(kind, row), "references": [media]}
        if kind == "pairs":
            line |= {"references": [reference_path(row)], "person": row["reference"].partition(".")[0]}
        elif kind == "video":
            own = [(at, key["frame"]) for key in row["keys"][: config.keep.references]] or [(at, 0)]
            photos = [(media_path(kind, all_rows[other], config), frame) for other, frame in found[at] or own]
            line["references"] = [f"{path}@{frame}" for path, frame in photos]
            line["person"] = all_rows[people[at]]["id"]
        yield line | {what: row[what] for what in ("source", "licence") if row[what]}


def caption_of(kind: Kind, row: Row) -> str:
    return portrait_caption(row["caption"]) if kind == "portraits" else marked(row["caption"])


def media_path(kind: Kind, row: Row, config: CurationConfig) -> str:
    """The name says all that the content depends on."""
    bordered_to = f"-{config.width}x{config.height}.jpg"
    suffix = {"video": ".mp4", "portraits": bordered_to}.get(kind, row["suffix"])
    return f"media/{row['id'][:2]}/{row['id']}{suffix}"


def reference_path(row: Row) -> str:
    return f"references/{row['reference'][:2]}/{row['reference']}"


def write_shard(
    kind: Kind, shard: Shard, rows: Sequence[Row], output: Path, config: CurationConfig
) -> None:
    """The files of a shard's rows, as far as they are missing; each whole or not there.

    Raises MagicMirrorError for an input that is not what was measured.
    """
    missing: dict[str, list[Row]] = {}
    for row in rows:
        if not all((output / path).is_file() for path in files_of(kind, row, config)):
            missing.setdefault(row["name"], []).append(row)
    for item in shard.items():
        if kind == "video":
            _write_clips(item, missing.get(item.name, ()), output, config)
        else:
            for row in missing.get(item.name, ()):
                _write_picture(kind, item, row, output, config)


def files_of(kind: Kind, row: Row, config: CurationConfig) -> list[str]:
    """What is written of a row, below the output's folder."""
    return [media_path(kind, row, config), *([reference_path(row)] if kind == "pairs" else [])]


def _write_picture(kind: Kind, item: Item, row: Row, output: Path, config: CurationConfig) -> None:
    content = item.read()
    if kind == "portraits":
        content = bordered(decode_image(io.BytesIO(content), item.name), config.width / config.height)
    _write(output / media_path(kind, row, config), content)
    if kind == "pairs":
        _write(output / reference_path(row), read(item.reference, f"The reference of {item.name}"))


def _write_clips(item: Item, rows: Sequence[Row], output: Path, config: CurationConfig) -> None:
    if not rows:
        return
    with item.on_disk() as path:
        for row in rows:
            frames = clip_frames(path, row["frames"])
            write_video(output / media_path("video", row, config), frames, config.measure.fps, quality=_QUALITY)


def bordered(image: np.ndarray, aspect: float) -> bytes:
    """A JPEG of a picture, (H, W, 3) uint8 RGB, in the middle of pure black of this width by height."""
    height, width = image.shape[:2]
    size = (max(width, round(height * aspect)), max(height, round(width / aspect)))
    picture = Image.new("RGB", size)
    picture.paste(Image.fromarray(image), ((size[0] - width) // 2, (size[1] - height) // 2))
    return jpeg(picture)


def jpeg(picture: Image.Image) -> bytes:
    """In the quality of all that is written here."""
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=_QUALITY, subsampling=0)
    return file.getvalue()


def _write(path: Path, content: bytes) -> None:
    if not path.is_file():
        write_bytes(path, content)


def check_written(output: Path, line: Mapping[str, Any]) -> Mapping[str, Any]:
    """The line. Raises MagicMirrorError if a file of it is missing: an input changed while it was read."""
    for path in (line["media"], *line["references"]):
        if not (output / path.partition("@")[0]).is_file():
            raise MagicMirrorError(
                f"{output / path} could not be written: its input is not what was measured. Run this again."
            )
    return line
