"""Names of files and folders that come from outside: what may be one, and whether it leads out of its folder."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path, PureWindowsPath

from .limits import NAME_LENGTH, NAME_PART_BYTES


def stays_within(name: object) -> bool:
    """Whether something is the name of a file or folder below another one: not a path from the root, without `..`, and
    what a file system takes. Where its links lead is for `is_below`."""
    if not isinstance(name, str) or not 0 < len(name) <= NAME_LENGTH:
        return False
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in name):  # control, half of a surrogate pair
        return False
    path = PureWindowsPath(name)  # its rules know both kinds of slash, and drives
    fits = all(len(part.encode("utf-8")) <= NAME_PART_BYTES for part in path.parts)
    return fits and not path.anchor and ".." not in path.parts


def is_below(path: Path, root: Path) -> bool:
    """Whether a file or folder lies below a folder, links followed on both sides."""
    return Path(os.path.realpath(root)) in Path(os.path.realpath(path)).parents
