"""JSON from files that others made: an object, no larger than said, or a CheckpointError that says what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from .errors import CheckpointError
from .limits import CONFIG_BYTES, MANIFEST_LINE_BYTES, METADATA_BYTES


def read_object(path: Path, *, most: int = CONFIG_BYTES) -> dict[str, Any]:
    """The object in a JSON file of at most so many bytes. Raises CheckpointError."""
    try:
        size = path.stat().st_size
        if size > most:
            raise CheckpointError(
                f"{path} has {size:,} bytes; a file of this kind has at most {most:,}. Download it again."
            )
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Download or copy it again.") from error
    return parse_object(text, str(path), most=most)


def read_lines(path: Path, *, most: int = MANIFEST_LINE_BYTES) -> list[dict[str, Any]]:
    """The objects in a file that has one a line, each of at most so many bytes. Raises CheckpointError."""
    found = []
    try:
        with path.open("rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(most + 1), b""), 1):
                where = f"Line {number} of {path}"
                found.append(parse_object(line.decode("utf-8"), where, most=most))
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Download or copy it again.") from error
    return found


def parse_object(text: str, where: str, *, most: int = METADATA_BYTES) -> dict[str, Any]:
    """The object that a JSON text is. where: what a message calls the text. Raises CheckpointError."""
    found = parse(text, where, most=most)
    if not isinstance(found, dict):
        raise CheckpointError(f"{where} is a JSON {_kind(found)}, not an object. Download or copy it again.")
    return found


def parse(text: str, where: str, *, most: int = METADATA_BYTES) -> Any:
    """What a JSON text says. Python's own extensions, NaN and Infinity, are not taken. Raises CheckpointError."""
    if len(text) > most:
        raise CheckpointError(f"{where} has {len(text):,} characters of JSON; it may have {most:,}.")
    try:
        return json.loads(text, parse_constant=_refuse)
    except RecursionError:
        reason = "its brackets are nested too deeply"
    except ValueError as error:
        reason = str(error)
    raise CheckpointError(f"{where} is damaged, it is no JSON: {reason}. Download or copy it again.")


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number")


def _kind(value: object) -> str:
    names = {str: "text", list: "list", bool: "truth value", int: "number", float: "number", type(None): "null"}
    return names[type(value)]
