"""The one way to open a `.safetensors` file, to tell what it holds, and to compare that with what it should hold."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError
from ..limits import HEADER_BYTES

Shapes = Mapping[str, tuple[int, ...]]
"""Keys and shapes of tensors; a `torch.Size` is a tuple."""

_FLOATS = {torch.float64, torch.float32, torch.bfloat16, torch.float16}
_FP8 = {torch.float8_e4m3fn: 0x7F, torch.float8_e5m2: 0x7C}
"""From which byte on, without its sign, it stands for no number."""

# A report of a wrong file names so many keys of each kind, and counts the rest.
KEYS_SHOWN = 5


@contextmanager
def open_safetensors(path: Path, framework: str = "pt") -> Iterator[Any]:
    """safetensors' own handle of a file. framework: of the tensors that it gives, "pt" or "np".

    Raises:
        CheckpointError: the file is missing, damaged, or a pickle; also when a tensor cannot be read in the `with`.
    """
    handle = safetensors_handle(path, framework)
    try:
        with handle as file:
            yield file
    except SafetensorError as error:
        raise _damaged(path, error) from error


def safetensors_handle(path: Path, framework: str = "pt") -> Any:
    """The same, to be kept open. Raises CheckpointError."""
    if not path.is_file():
        raise CheckpointError(f"There is no file {path}. Give the path of a .safetensors file.")
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if HEADER_BYTES < header < path.stat().st_size:
        raise CheckpointError(f"{path.name} has a header of {header:,} bytes; at most {HEADER_BYTES:,} are read.")
    try:
        return safe_open(path, framework=framework)
    except (SafetensorError, OSError) as error:
        if _is_pickle(path):
            raise CheckpointError(
                f"{path.name} is a pickle (.pt, .bin), which can run code when it is read. Only .safetensors files are "
                "read here: ask for one, or convert it where you trust its source."
            ) from None
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> CheckpointError:
    size = path.stat().st_size
    return CheckpointError(f"{path.name} is damaged or cut short ({size:,} bytes): {error}. Download or copy it again.")


def shapes_in(file: Any) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the tensors in an open file; no tensor is read."""
    return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118, not a dict


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of a file's tensors. Raises CheckpointError as `open_safetensors`."""
    # Not "pt": that maps the whole file writable, which a machine with less memory than the file may refuse.
    with open_safetensors(path, framework="np") as file:
        return shapes_in(file)


def is_whole(path: Path) -> bool:
    """Whether a file can be opened: its header is read, and its length compared with it."""
    try:
        tensor_shapes(path)
    except CheckpointError:
        return False
    return True


def read_weight(file: Any, key: str, path: Path, dtype: torch.dtype) -> torch.Tensor:
    """One tensor of an open file, as `as_weight` makes it."""
    return as_weight(file.get_tensor(key), key, path, dtype)


def as_weight(tensor: torch.Tensor, key: str, path: Path, dtype: torch.dtype) -> torch.Tensor:
    """A file's tensor as weights of that type, in memory of its own: the file may be replaced afterwards.

    Raises CheckpointError for a tensor that holds no floating-point numbers, or values that are none in that type.
    """
    _check_kind(tensor, key, path)
    weight = tensor.to(dtype, copy=True)
    _check_finite(weight, key, path)
    return weight


def check_weight(tensor: torch.Tensor, key: str, path: Path) -> None:
    """The same, of a tensor that stays as it is stored."""
    _check_kind(tensor, key, path)
    _check_finite(tensor, key, path)


def _check_kind(tensor: torch.Tensor, key: str, path: Path) -> None:
    if tensor.dtype not in _FLOATS and tensor.dtype not in _FP8:
        raise CheckpointError(
            f"{path.name}: {key} is {str(tensor.dtype).removeprefix('torch.')}, not a floating-point tensor. Use the "
            "model's own weights, not a quantised copy."
        )


def _check_finite(weight: torch.Tensor, key: str, path: Path) -> None:
    if not _is_finite(weight):
        kind = str(weight.dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{path.name} holds values that are no numbers in {kind}, in {key}. Download or copy the file again; if it "
            "is whole, choose the precision bf16 or fp32."
        )


def _is_finite(weight: torch.Tensor) -> bool:
    """Whether all values are numbers, at a twentieth of what a load costs."""
    if weight.dtype in _FP8 and weight.numel():  # torch does not reduce these
        first = _FP8[weight.dtype]
        return bool(weight.view(torch.int8).max() < first and weight.view(torch.uint8).max() < first + 0x80)
    # A sum costs a tenth of looking at each value; only one that overflows by itself needs the closer look.
    return math.isfinite(weight.sum().item()) or bool(weight.isfinite().all())


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a file, on the CPU, as stored. Raises CheckpointError as `open_safetensors`."""
    with open_safetensors(path) as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, not a dict


def check_tensors(path: Path, expected: Shapes, found: Shapes) -> None:
    """Compare keys and shapes; raise one CheckpointError that lists everything that is wrong."""
    missing = [key for key in expected if key not in found]
    unexpected = [key for key in found if key not in expected]
    misshapen = [
        f"{key} {tuple(found[key])} instead of {tuple(shape)}"
        for key, shape in expected.items()
        if key in found and found[key] != shape
    ]
    problems = [
        f"{len(keys)} {kind}: {', '.join(keys[:KEYS_SHOWN])}{' ...' if len(keys) > KEYS_SHOWN else ''}"
        for kind, keys in (("missing", missing), ("unexpected", unexpected), ("of a wrong shape", misshapen))
        if keys
    ]
    if problems:
        raise CheckpointError(f"{path.name} does not hold the tensors it should: " + "; ".join(problems) + ".")


def _is_pickle(path: Path) -> bool:
    """Whether a file that is no safetensors file starts like `torch.save`'s. (A safetensors file starts with a length,
    which can be these bytes too.)"""
    with path.open("rb") as file:
        return file.read(2) in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
