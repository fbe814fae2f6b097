"""What the encoders made of a prompt or of photos, on disk: what was seen before needs no encoder."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from ..checkpoints.safetensors_file import open_safetensors
from ..errors import CheckpointError, MagicMirrorError
from ..files import write_bytes

log = logging.getLogger(__name__)

_MOST_BYTES = 512 * 2**20  # a prompt of T5-XXL has 2 MB, a photo 1
_FORMAT = 1


@dataclass(frozen=True)
class DiskCache:
    """Tensors by a key, a file each, in a folder that others cannot read; those used longest ago are swept.

    A file that is damaged, or cannot be read or written, is as one that is not there.
    """

    folder: Path

    def get(self, key: str) -> dict[str, Tensor] | None:
        """What was kept, in memory of its own."""
        path = self._path(key)
        try:
            with open_safetensors(path) as file:
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118, not a dict
                whole = (file.metadata() or {}).get("sha256") == _digest(tensors)
            if not whole:
                return None
            os.utime(path)
        except (CheckpointError, OSError):
            return None
        return tensors

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_bytes(self._path(key), save(tensors, metadata={"sha256": _digest(tensors)}))
            self._sweep()
        except (MagicMirrorError, OSError) as error:
            log.info("MagicMirror keeps nothing of its encoders on disk: %s", error)

    def _sweep(self) -> None:
        files = [(path.stat(), path) for path in self.folder.glob("*.safetensors")]
        files.sort(key=lambda item: item[0].st_mtime_ns)
        size = sum(stat.st_size for stat, _ in files)
        for stat, path in files:
            if size <= _MOST_BYTES:
                return
            path.unlink(missing_ok=True)
            size -= stat.st_size

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"


def cache_key(files: Iterable[Path], *inputs: object) -> str:
    """Of what comes of `inputs` in an encoder with its weights in these files.

    A file is known by path, size and time of its last change, as where models are shared in a process: to read all of
    T5-XXL for a hash would take as long as to load it.
    """
    versions = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in map(Path.resolve, files)]
    return hashlib.sha256(repr((_FORMAT, versions, inputs)).encode()).hexdigest()


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(repr((name, tensor.dtype, tensor.shape)).encode())
        digest.update(save({"": tensor}))
    return digest.hexdigest()
