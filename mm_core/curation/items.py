"""What there is to look at, in shards: folders, tar files as WebDataset and img2dataset write them, parquet.

An item is all files of one name: `7.jpg` with `7.txt` or `7.json` beside it, and `7.reference.jpg` in a set of pairs.
A shard is what is measured and written in one go: a tar file, a parquet file, or some files of a folder.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data.manifest import PICTURES, VIDEOS
from ..errors import CheckpointError, SampleError, SettingError
from ..json_file import parse_object, read_object
from ..limits import CONFIG_BYTES, MEDIUM_BYTES
from ..names import is_below, stays_within

ORIGIN = "source.json"
"""In an input's folder: {"source": "SFHQ", "licence": "MIT"}, for items that do not say it themselves."""
REFERENCE = ".reference"
_SIDECARS = (".txt", ".json")
_FILES = {PICTURES: 256, VIDEOS: 4}  # of a folder's shards, on average
_NAMES = {"caption": ("caption", "text", "prompt"), "source": ("source", "url"), "licence": ("licence", "license")}


@dataclass(kw_only=True)
class Item:
    """A medium, read when it is asked for, and what is said of it."""

    name: str
    """In its shard."""
    suffix: str = ""
    """Of the medium, `.jpg`; "" where there is none."""
    content: bytes | Path | None = None
    reference: bytes | Path | None = None
    """Another picture of the person, in a set of pairs."""
    reference_suffix: str = ""
    info: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None
    """Why it cannot be read, where that is known already."""

    def said(self, what: str) -> str | None:
        """caption, source or licence."""
        found = (self.info.get(name) for name in _NAMES[what])
        return next((text.strip() for text in found if isinstance(text, str) and text.strip()), None)

    def read(self) -> bytes:
        """Raises SampleError where the medium is missing, empty or too large."""
        if self.problem is not None:
            raise SampleError("unreadable", self.problem)
        return read(self.content, self.name)

    @contextmanager
    def on_disk(self) -> Iterator[Path]:
        """The medium as a file, for as long as it is used: videos are sought in. Raises as `read`."""
        if isinstance(self.content, Path) and self.problem is None and self.content.is_file():
            yield self.content
            return
        with tempfile.NamedTemporaryFile(suffix=self.suffix) as file:
            file.write(self.read())
            file.flush()
            yield Path(file.name)


def read(content: bytes | Path | None, name: str) -> bytes:
    """Raises SampleError."""
    if isinstance(content, Path):
        content = content.read_bytes() if content.is_file() and content.stat().st_size <= MEDIUM_BYTES else None
    if not content:
        wanted = f"{name} is missing, empty or has more than {MEDIUM_BYTES:,} bytes; put the file there again"
        raise SampleError("unreadable", wanted)
    return content


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Some items. root: the input's folder. files: a tar file, a parquet file, or media, below it."""

    root: str
    files: tuple[str, ...]
    source: str | None = None
    licence: str | None = None

    def key(self, settings: Mapping[str, Any]) -> str:
        """A name for what is measured of these files, as they are now, by such settings: by their sizes and times, not
        their bytes, which would have to be read for it, and wherever the input's folder is."""
        stats = []
        for name in self.files:
            path = Path(self.root, name)
            for file in (path, *_beside(path)):
                if file.is_file():
                    stat = file.stat()
                    stats.append((str(file.relative_to(self.root)), stat.st_size, stat.st_mtime_ns))
        said = json.dumps([stats, self.source, self.licence, settings], sort_keys=True)
        return hashlib.sha256(said.encode()).hexdigest()[:32]

    def items(self) -> Iterator[Item]:
        """In the order of the files, one at a time; where one is damaged, an item that says so, and no more."""
        first = Path(self.root, self.files[0])
        try:
            if first.suffix == ".tar":
                yield from _of_tar(first)
            elif first.suffix == ".parquet":
                yield from _of_parquet(first)
            else:
                for name in self.files:
                    yield _of_file(Path(self.root), name)
        except CheckpointError as error:
            yield Item(name=self.files[0], problem=str(error))


def shards_of(path: Path, media: tuple[str, ...]) -> list[Shard]:
    """The shards of an input. path: a folder, tar or parquet file. media: PICTURES or VIDEOS.

    Adding a file to a folder changes one of its shards, not all that come after it.

    Raises SettingError for an input that is not there or holds nothing.
    """
    path = path.expanduser().resolve()
    root = path if path.is_dir() else path.parent
    found = sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]
    origin = _origin(root)
    shards: list[Shard] = []
    names: list[str] = []

    def close() -> None:
        if names:
            shards.append(Shard(root=str(root), files=tuple(names), **origin))
            names.clear()

    for file in found:
        name = file.relative_to(root).as_posix()
        if file.suffix == ".tar" or (file.suffix == ".parquet" and not _describes(file)):
            shards.append(Shard(root=str(root), files=(name,), **origin))
        elif file.suffix.lower() in media and not file.stem.endswith(REFERENCE):
            names.append(name)
            if zlib.crc32(name.encode()) % _FILES[media] == 0 or len(names) == 4 * _FILES[media]:
                close()
    close()
    if not shards:
        raise SettingError(f"{path} holds nothing to look at: no {', '.join(media)}, .tar or .parquet file.")
    return shards


def _origin(root: Path) -> dict[str, str | None]:
    said = Item(name=ORIGIN, info=read_object(root / ORIGIN) if (root / ORIGIN).is_file() else {})
    return {what: said.said(what) for what in ("source", "licence")}


def _describes(parquet: Path) -> bool:
    """Whether it is img2dataset's list of what is in the tar file or folder of its name, which says the same."""
    return parquet.with_suffix(".tar").is_file() or parquet.with_suffix("").is_dir()


def _beside(path: Path) -> list[Path]:
    references = [path.with_name(f"{path.stem}{REFERENCE}{suffix}") for suffix in PICTURES]
    return [*(path.with_suffix(suffix) for suffix in _SIDECARS), *references]


def _of_file(root: Path, name: str) -> Item:
    path = root / name
    item = Item(name=name, suffix=path.suffix.lower(), content=path)
    for file in _beside(path):
        if file.is_file() and REFERENCE in file.name:
            _add(item, file.suffix.lower(), file, True)
        elif file.is_file() and file.stat().st_size <= CONFIG_BYTES:
            _add_said(item, file.suffix, file.read_bytes())
    return item


def _of_tar(path: Path) -> Iterator[Item]:
    """Neighbours of one name are an item, as WebDataset has it."""
    item: Item | None = None
    try:
        with tarfile.open(path, "r|") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                stem, dot, suffix = member.name.rpartition(".")
                stem, of_reference, _ = stem.partition(REFERENCE)
                if item is None or item.name != stem:
                    if item is not None:
                        yield item
                    item = Item(name=stem)
                content = tar.extractfile(member).read() if member.size <= MEDIUM_BYTES else None
                _add(item, dot + suffix.lower(), content, bool(of_reference))
    except (tarfile.TarError, OSError) as error:
        raise CheckpointError(f"{path} is damaged: {error}. Download it again.") from error
    if item is not None:
        yield item


def _add(item: Item, suffix: str, content: bytes | Path | None, is_reference: bool = False) -> None:
    if is_reference:
        if suffix in PICTURES:
            item.reference, item.reference_suffix = content, suffix
    elif suffix in (*PICTURES, *VIDEOS):
        item.suffix, item.content = suffix, content
    elif suffix in _SIDECARS and isinstance(content, bytes):
        _add_said(item, suffix, content)


def _add_said(item: Item, suffix: str, content: bytes) -> None:
    text = content.decode("utf-8", "replace")
    if suffix == ".json":
        try:
            item.info |= parse_object(text, f"What is said of {item.name}")
        except CheckpointError as error:
            item.problem = str(error)
    else:
        item.info["caption"] = text


def _of_parquet(path: Path) -> Iterator[Item]:
    """img2dataset's and Hugging Face's: a column with the bytes, named by a suffix, `image` or `video`, or one named
    `path` with a file below the parquet file's folder; other columns as in a .json file."""
    from pyarrow import ArrowInvalid
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            for first, batch in enumerate(file.iter_batches(batch_size=16)):
                for number, row in enumerate(batch.to_pylist(), 16 * first):
                    yield _of_row(path, f"{row.get('key') or number}", row)
    except (ArrowInvalid, OSError) as error:
        raise CheckpointError(f"{path} is damaged: {error}. Download it again.") from error


def _of_row(path: Path, name: str, row: dict[str, Any]) -> Item:
    item = Item(name=name, info={key: value for key, value in row.items() if isinstance(value, str)})
    for column, value in row.items():
        if isinstance(value, dict):  # Hugging Face's: {"bytes": ..., "path": ...}
            column, value = value.get("path") or column, value.get("bytes")
        if isinstance(value, bytes):
            suffix = {"image": ".jpg", "video": ".mp4"}.get(column) or Path(f"x.{column}").suffix.lower()
            _add(item, suffix, value, column.startswith(REFERENCE[1:]))
        elif column == "path" and isinstance(value, str):
            file = path.parent / value
            if stays_within(value) and is_below(file, path.parent):
                _add(item, file.suffix.lower(), file)
    return item
