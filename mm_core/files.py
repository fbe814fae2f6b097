"""Files that are there whole or not at all, and that replace none unless they are meant to."""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import MagicMirrorError

DOWNLOADS = Path.home() / ".cache" / "magic-mirror-models"
"""Where commands put the models that they fetch."""
ENCODED = Path.home() / ".cache" / "magic-mirror-encoded"
"""Where commands keep what encoders made of prompts and photos."""
PARTIAL = ".partial"
"""How the name of an unfinished file ends; a killed process may leave one behind."""
STALE_SECONDS = 24 * 3600
"""An unfinished file that nobody has written to for so long is one that a killed process left."""

_UNFINISHED = re.compile(rf"\..*\.[0-9a-f]{{16}}{re.escape(PARTIAL)}")
_OF_SAFETENSORS = re.compile(r"\.tmp[0-9A-Za-z]{6}")  # what its newer versions write before they rename it
_KEPT_OF_NAME = 40  # characters of a file's name in that of its unfinished one: a name has a limit of 255 bytes
_NUMBER_DIGITS = 5

_FULL = "The disk is full, or the quota is: delete files that are not needed, or write to another disk"
_FORBIDDEN = "Let the user that runs this write there, or choose another folder"
_REMEDIES = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EFBIG: "A file may not be so large on this disk or in this process: choose another disk, or make it smaller",
    errno.EROFS: _FORBIDDEN,
    errno.EACCES: _FORBIDDEN,
    errno.EPERM: _FORBIDDEN,
    errno.ENOTDIR: "A part of its path is a file: rename that file, or choose another folder",
    errno.EISDIR: "It is a folder: choose another name",
    errno.ENAMETOOLONG: "Choose a shorter name",
    errno.EIO: "The disk reports a fault: write to another one, and check it",
}


@dataclass
class Numbered:
    """A file that gets the next free number of its name when it is whole: `anna_00001_.mp4`, or `00001_.mp4` of "".

    A number is taken that no file of this name has, whatever its suffix, and no file is ever replaced: not by two
    processes that save the same name at the same time either.
    """

    folder: Path
    name: str
    suffix: str
    first: int | None = None
    """The number to try before the next free one."""
    number: int | None = None
    """Of the finished file; None before."""

    @property
    def path(self) -> Path:
        """Where the finished file is."""
        if self.number is None:
            raise ValueError("the file is not finished")
        return self._of(self.number)

    def publish(self, temporary: Path) -> None:
        """Give a finished file its name."""
        number = self._next() if self.first is None else self.first
        while True:
            try:
                _rename_new(temporary, self._of(number))
            except FileExistsError:  # another process was quicker
                number = max(number + 1, self._next())
            else:
                self.number = number
                return

    def _of(self, number: int) -> Path:
        return self.folder / numbered_name(self.name, number, self.suffix)

    def _next(self) -> int:
        numbers = re.compile(re.escape(f"{self.name}_" if self.name else "") + r"(\d+)[_.]", re.IGNORECASE)
        found = (numbers.match(name) for name in os.listdir(self.folder))
        return max((int(match[1]) for match in found if match), default=0) + 1


def numbered_name(name: str, number: int, suffix: str) -> str:
    """The name of a numbered file, as ComfyUI's own savers count: `anna_00001_.mp4`."""
    return f"{name}{'_' if name else ''}{number:0{_NUMBER_DIGITS}}_{suffix}"


@contextmanager
def atomic_write(target: Path | Numbered) -> Iterator[Path]:
    """A temporary file in the folder of `target` that becomes it, on disk to the last byte, when the block succeeds.

    The temporary name is unique on all machines that share the folder; those that killed processes left are swept. A
    `Path` is replaced, a `Numbered` never replaces anything. The file's mode is the process's usual one (umask).

    Raises:
        MagicMirrorError: the disk is full, the folder cannot be written to, or the like; nothing is left behind.
    """
    folder, name = (target.folder, target.name) if isinstance(target, Numbered) else (target.parent, target.name)
    temporary = _unfinished(folder, name)
    with _explained(folder, name):
        folder.mkdir(parents=True, exist_ok=True)
        temporary.touch(exist_ok=False)
        try:
            fresh = temporary.stat()
            _sweep(folder, now=fresh.st_mtime, tensors=name.endswith(".safetensors"))
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.chmod(fresh.st_mode)
            if isinstance(target, Numbered):
                target.publish(temporary)
            else:
                os.replace(temporary, target)
            _sync_folder(folder)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """An empty folder beside `path` that takes its place when the block ends without error.

    Raises:
        MagicMirrorError: as `atomic_write`.
    """
    temporary, old = _unfinished(path.parent, path.name), _unfinished(path.parent, path.name)
    with _explained(path.parent, path.name):
        temporary.mkdir(parents=True)
        try:
            _sweep(path.parent, now=temporary.stat().st_mtime)
            yield temporary
            if path.exists():
                path.rename(old)
            temporary.rename(path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)


def is_current(path: Path, source: Path) -> bool:
    """Whether a file is there, and no older than the one that it was made of."""
    return path.is_file() and path.stat().st_mtime_ns >= source.stat().st_mtime_ns


def write_bytes(target: Path | Numbered, content: bytes) -> None:
    """Write a file, whole or not at all."""
    with atomic_write(target) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8, whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: object) -> None:
    """Write JSON, whole or not at all."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """JSON Lines, one object each, whole or not at all."""
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def append_lines(path: Path, lines: list[str]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)


def _unfinished(folder: Path, name: str) -> Path:
    return folder / f".{name[:_KEPT_OF_NAME]}.{secrets.token_hex(8)}{PARTIAL}"


def _sweep(folder: Path, now: float, *, tensors: bool = False) -> None:
    """Remove what killed processes left in a folder.

    Args:
        now: by the clock of the folder's disk, which may be another machine's.
        tensors: what safetensors leaves, too.
    """
    for entry in os.scandir(folder):
        if not _UNFINISHED.fullmatch(entry.name) and not (tensors and _OF_SAFETENSORS.fullmatch(entry.name)):
            continue
        try:
            if now - entry.stat(follow_symlinks=False).st_mtime > STALE_SECONDS:
                shutil.rmtree(entry) if entry.is_dir(follow_symlinks=False) else os.unlink(entry)
        except OSError:  # another process swept it, or it is another user's
            continue


def _rename_new(source: Path, target: Path) -> None:
    """Give a file a name that none has, else raise FileExistsError: in one step, where the file system can."""
    if os.name == "nt":
        os.rename(source, target)
        return
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links; a kill between these two steps would leave an empty file
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        os.replace(source, target)
    else:
        source.unlink()


def _sync_folder(folder: Path) -> None:
    """Have a new name on disk, too; Windows has no such call."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # some network file systems know none for folders
        pass
    finally:
        os.close(descriptor)


@contextmanager
def _explained(folder: Path, name: str) -> Iterator[None]:
    """Errors of the disk at `folder` become a message that names it and says what to do; others pass."""
    try:
        yield
    except MagicMirrorError:
        raise
    except Exception as error:  # the libraries that write files have error classes of their own
        remedy = _REMEDIES.get(_number(error))
        if remedy is None or not _concerns(error, folder):
            raise
        reason = os.strerror(_number(error))
        raise MagicMirrorError(
            f"Cannot write {name or 'a file'} in {folder}: {reason}. {remedy}. Nothing half-written was left."
        ) from error


def _number(error: Exception) -> int:
    """The operating system's number of an error, 0 where it has none. safetensors only writes it into its text."""
    found = re.search(r"\b(?:code:|os error) (\d+)", str(error))
    return getattr(error, "errno", None) or (int(found[1]) if found else 0)


def _concerns(error: Exception, folder: Path) -> bool:
    """Whether an error is of this folder, and not of a file elsewhere that the block reads."""
    filename = getattr(error, "filename", None)
    if not isinstance(filename, str | os.PathLike):
        return True
    path, folder = Path(os.path.abspath(filename)), Path(os.path.abspath(folder))
    return path.parent == folder or path == folder or path in folder.parents
