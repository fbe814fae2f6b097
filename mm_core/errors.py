"""What can go wrong by the user's hand. Every message names the value, the limit and the remedy."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_LONGEST_WORD = 1000  # a path has 4,096 characters at most, and none is so long
_ENDLESS = re.compile(rf"(\S{{200}})\S{{{_LONGEST_WORD},}}")
_UNPRINTABLE = re.compile("[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\ud800-\\udfff]")


def printable(text: str) -> str:
    """The text with control characters and halves of characters as escapes: a log in UTF-8 fails at the latter, and
    the thread of ComfyUI that runs prompts ends with that."""
    return _UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], text)


class MagicMirrorError(Exception):
    """Base of all errors that a user can mend; anything else that escapes is a bug.

    Args:
        message: the English text; with a `key`, its template, whose fields `values` fill.
        key: the name of the same template in other languages (`magicMirror.errors` in locales/*/main.json).
    """

    def __init_subclass__(cls) -> None:
        cls.__module__ = "MagicMirror"  # ComfyUI shows it before the name: not the path that the pack is in

    def __init__(self, message: str, *, key: str | None = None, **values: object) -> None:
        text = printable(message.format(**values) if key else message)
        super().__init__(_ENDLESS.sub(r"\1...", text))
        self.key = key
        self.values = values


class NoFaceError(MagicMirrorError):
    """No face was found where one is needed."""


class FaceChoiceError(MagicMirrorError):
    """The chosen face does not exist in the photo."""


class PromptError(MagicMirrorError):
    """The prompt names no person, or the person's word was cut off."""


class CheckpointError(MagicMirrorError):
    """A weights file is missing, damaged, or made for something else."""


class SettingError(MagicMirrorError):
    """A number is out of its range: a size, a length, a strength, a step count."""


class SampleError(MagicMirrorError):
    """A sample of a data set cannot be trained on: `kind` is a word or two for counting, "too small", "no face"."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class DecodeError(MagicMirrorError):
    """Sampling succeeded and the VAE decode did not: `latents` holds the sampled clip, (1, C, F, H, W)."""

    def __init__(self, message: str, latents: object) -> None:
        super().__init__(message)
        self.latents = latents


class NumericsError(MagicMirrorError):
    """A computation gave NaN or infinity: mostly an overflow of its precision."""


class OutOfMemoryError(MagicMirrorError):
    """A device, or the machine, has too little memory for what was asked."""


def short(value: object) -> str:
    """A value of a file, for a message, however long it is."""
    if isinstance(value, (list, dict)):  # may be nested deeper than `repr` goes
        return f"a {type(value).__name__} of {len(value)}"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def reason(error: Exception) -> str:
    """What an error says, without the number and the name that those of the system repeat."""
    return (isinstance(error, OSError) and error.strerror) or str(error)


@contextmanager
def downloading(what: str) -> Iterator[None]:
    """Around a download: whatever stops it becomes a MagicMirrorError that says what was being fetched."""
    try:
        yield
    except Exception as error:  # the clients' errors share no base class
        raise MagicMirrorError(
            f"Downloading {what} failed: {error}. Check the connection and try again, or put the files there by hand."
        ) from error


@contextmanager
def packages() -> Iterator[None]:
    """Around all that a node or a command does: a missing package becomes a message that says what to install, and
    what the system says of a file one that names it."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise
        raise MagicMirrorError(
            f"{error.filename} cannot be used: {reason(error)}. Give another path, or let the user that runs this "
            "read and write there."
        ) from error
    except (ImportError, RuntimeError) as error:  # diffusers imports late, and wraps what fails then in the second
        missing = _root_import_error(error)
        if missing is None:
            raise
        requirements = Path(__file__).resolve().parents[1] / "requirements.txt"
        raise MagicMirrorError(
            f"MagicMirror needs a Python package that is missing or too old ({missing}). Install its requirements and "
            f'start again: "{sys.executable}" -m pip install -r "{requirements}"'
        ) from error


def exit_code(command: Callable[[], int | None], interrupted: str = "cancelled") -> int:
    """Of a command line: the command's own, 0 for None, 2 for a mistake of the user's, which is told, 130 when it is
    interrupted, told in the words of `interrupted`."""
    try:
        with packages():
            return command() or 0
    except MagicMirrorError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130


def _root_import_error(error: BaseException | None) -> ImportError | None:
    """The innermost ImportError that led to an error, which names the package; None where there was none."""
    found = None
    while error is not None:
        found = error if isinstance(error, ImportError) else found
        error = error.__cause__
    return found
