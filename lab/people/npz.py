"""The one array of a shard of rendered people, its size known before it is unpacked."""

from __future__ import annotations

import zipfile
from math import prod
from pathlib import Path

import numpy as np

from mm_core.errors import SampleError

SHARD_BYTES = 2 * 2**30
"""Once unpacked; 48 clips of 9 frames at 64 px have 5 MB."""

_ARRAY = "frames"


def read_frames_array(file: Path) -> np.ndarray:
    """(clips, F, H, W, 3) uint8. Raises SampleError "corrupt file" for another file, and for one too large."""
    try:
        shape, dtype = _announced(file)
        size = prod(shape) * dtype.itemsize
        if size > SHARD_BYTES:
            raise SampleError(
                "corrupt file", f"{file} unpacks to {size:,} bytes; at most {SHARD_BYTES:,} are read. Render it again"
            )
        if len(shape) != 5 or shape[-1] != 3 or dtype != np.uint8:
            raise SampleError("corrupt file", f"{file} holds {shape} {dtype}, not (clips, F, H, W, 3) uint8")
        with np.load(file, allow_pickle=False) as shard:
            return shard[_ARRAY]
    except SampleError:
        raise
    except Exception as error:  # numpy and zipfile raise a dozen kinds
        raise SampleError("corrupt file", f"cannot read the shard {file}: {error}. Render or copy it again") from error


def _announced(file: Path) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type that the array's own header names; nothing else is unpacked."""
    with zipfile.ZipFile(file) as archive, archive.open(f"{_ARRAY}.npy") as stream:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(stream)
    return shape, dtype
