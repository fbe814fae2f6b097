"""What can go wrong by the user's hand. Every message names the value, the limit and the remedy."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class MagicMirrorError(Exception):
    """Base of all errors that a user can mend; anything else that escapes is a bug.

    Args:
        message: the English text; with a `key`, its template, whose fields `values` fill.
        key: the name of the same template in other languages (`magicMirror.errors` in locales/*/main.json).
    """

    def __init_subclass__(cls) -> None:
        cls.__module__ = "MagicMirror"  # ComfyUI shows it before the name: not the path that the pack is in

    def __init__(self, message: str, *, key: str | None = None, **values: object) -> None:
        super().__init__(message.format(**values) if key else message)
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
    """Around all that a node or a command does: a missing package becomes a message that says what to install."""
    try:
        yield
    except (ImportError, RuntimeError) as error:  # diffusers imports late, and wraps what fails then in the second
        missing = _root_import_error(error)
        if missing is None:
            raise
        requirements = Path(__file__).resolve().parents[1] / "requirements.txt"
        raise MagicMirrorError(
            f"MagicMirror needs a Python package that is missing or too old ({missing}). Install its requirements and "
            f'start again: "{sys.executable}" -m pip install -r "{requirements}"'
        ) from error


def _root_import_error(error: BaseException | None) -> ImportError | None:
    """The innermost ImportError that led to an error, which names the package; None where there was none."""
    found = None
    while error is not None:
        found = error if isinstance(error, ImportError) else found
        error = error.__cause__
    return found
