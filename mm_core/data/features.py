"""Precomputed features of a data set, as training reads them.

A folder holds an index, written last, and three kinds of shards: prompts and references, with each distinct caption
and each distinct picture of a person once, and samples.
"""

# index.json and (F frames make F' latent ones):
# prompts-NNNNN.safetensors
#     prompt_embeds (n, T, Dtxt) float16 of a prompt with room for the identity, slots (n, N) int64 where that is. The
#     first is the empty prompt. Whole: T5 sees its padding, and makes of it what no constant could restore.
# references-NNNNN.safetensors
#     id_tokens (n, N, c), structure_tokens (n, S, clip) float16; embedding (n, 512) float32, raw ArcFace.
# samples-NNNNN.safetensors
#     latents (n, F', C, H', W') float16, times the VAE's scaling factor; boxes (n, F, 4), landmarks (n, F, 5, 2)
#     float32, the face in pixels of the frame; seen (n, F') bool, whether it was found in the frame that was looked at.

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..checkpoints.safetensors_file import safetensors_handle
from ..errors import CheckpointError
from ..json_file import parse_object, read_object
from ..limits import FEATURES_INDEX_BYTES

FORMAT = 2
INDEX = "index.json"
SETTINGS = "settings.json"
KINDS = ("prompts", "references", "samples")
UNKNOWN = "unknown"
"""The licence of samples whose line of the manifest names none."""
ROWS = "rows"
"""The one entry of a shard's header: JSON with the names of its rows, and what was left out."""
IN_MEMORY = 4 * 10**9  # bytes; larger sets stay on disk, mapped
_OPEN_SHARDS = 256


def shard_name(kind: str, number: int) -> str:
    """kind: one of KINDS."""
    return f"{kind}-{number:05d}.safetensors"


def header_of(path: Path) -> dict[str, Any]:
    """A shard's `rows` and `skipped`. Raises CheckpointError for a damaged file."""
    with _open(path) as file:
        return parse_object((file.metadata() or {}).get(ROWS, ""), f"`{ROWS}` of {path}")


def seen_in(path: Path) -> Tensor:
    """(n, F') bool, of a shard of samples."""
    with _open(path) as file:
        return file.get_tensor("seen")


class Features:
    """Features by number; see `open`.

    entries: for each sample its id, person (may be None) and references, numbers for `reference`.
    references: paths of the pictures. counts: samples, references, and what was skipped by reason.
    licences: how many samples have each, in a line.
    """

    def __init__(self, folder: Path, index: dict[str, Any], in_memory: bool) -> None:
        self.folder, self.counts, self.settings = folder, index["counts"], index["settings"]
        self.entries: list[dict[str, Any]] = index["samples"]
        self._references: list[dict[str, Any]] = index["references"]
        licences = index.get("licences") or {UNKNOWN: len(self.entries)}
        self.licences = ", ".join(f"{name} ({count:,})" for name, count in licences.items())
        self._kept = None if in_memory else _OPEN_SHARDS
        self._shards: OrderedDict[str, Any] = OrderedDict()
        self._prompts: list[dict[str, Any]] = index["prompts"]
        self.empty: Tensor = self._row("prompts", self._prompts[0])["prompt_embeds"][None]
        """(1, T, Dtxt) float16, the empty prompt."""

    @classmethod
    def open(cls, folder: Path) -> Features:
        """Raises CheckpointError if the folder is empty, unfinished or damaged."""
        folder = Path(folder).expanduser()
        path = folder / INDEX
        remedy = "Run `python -m mm_core.training precompute` with the same config"
        if not path.is_file():
            begun = any(folder.glob("*.safetensors"))
            state = "are not finished" if begun else "do not exist yet"
            raise CheckpointError(f"The features in {folder} {state}: there is no {INDEX}. {remedy}.")
        try:
            index = read_object(path, most=FEATURES_INDEX_BYTES)
            shards, version = _parts(index)
        except CheckpointError as error:
            raise CheckpointError(f"{error} Or remove it. {remedy}.") from error
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is damaged: {error!r}. Remove it. {remedy}.") from error
        if version != FORMAT:
            raise CheckpointError(f"{folder} holds features of another version. Remove the folder. {remedy}.")
        sizes = {name: (folder / name).stat().st_size if (folder / name).is_file() else 0 for name in shards}
        damaged = [name for name, size in shards.items() if sizes[name] != size]
        if damaged:
            raise CheckpointError(
                f"{folder}: {', '.join(damaged[:5])} ({len(damaged)} of {len(shards)} files) missing or cut short. "
                f"Remove what is left of them. {remedy}; it makes them again."
            )
        return cls(folder, index, in_memory=sum(shards.values()) < IN_MEMORY)

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def references(self) -> list[str]:
        return [reference["path"] for reference in self._references]

    def split(self, held_out: int, others: Collection[str] = ()) -> tuple[np.ndarray, np.ndarray]:
        """Rows to train on and to validate with: so many people, the last, are kept apart. others: people who are not
        trained on either."""
        people, apart = self._people(), self.last_people(held_out)
        validation = np.isin(people, apart)
        return np.flatnonzero(~validation & ~np.isin(people, list(others))), np.flatnonzero(validation)

    def last_people(self, count: int) -> list[str]:
        """Nobody, if there are no more than so many."""
        known = list(dict.fromkeys(self._people()))
        return known[len(known) - count :] if 0 < count < len(known) else []

    def _people(self) -> list[str]:
        return [entry["person"] or entry["id"] for entry in self.entries]

    def sample(self, number: int) -> dict[str, Any]:
        """One sample's tensors by name, without the first axis, and `references`, a list of numbers."""
        entry = self.entries[number]
        prompt = self._row("prompts", self._prompts[entry["prompt"]])
        return self._row("samples", entry) | prompt | {"references": entry["references"]}

    def reference(self, number: int) -> dict[str, Tensor]:
        """One picture's tensors by name, without the first axis."""
        return self._row("references", self._references[number])

    def _row(self, kind: str, entry: dict[str, Any]) -> dict[str, Tensor]:
        shard = self._shard(shard_name(kind, entry["shard"]))
        return {name: shard.get_slice(name)[entry["row"]] for name in shard.keys()}  # noqa: SIM118, not a dict

    def _shard(self, name: str) -> Any:
        """The shard, mapped or in memory; of the mapped ones the last used stay open."""
        if name not in self._shards:
            shard = _open(self.folder / name)
            self._shards[name] = shard if self._kept else _InMemory(shard)
        self._shards.move_to_end(name)
        if self._kept and len(self._shards) > self._kept:
            self._shards.popitem(last=False)
        return self._shards[name]


def _parts(index: dict[str, Any]) -> tuple[dict[str, int], object]:
    """The bytes of each shard, and the version. Raises KeyError or TypeError for an index of other types."""
    for entry in index["samples"] + index["references"]:
        if not type(entry["shard"]) is type(entry["row"]) is int:
            raise TypeError(f"a row is named {entry}")
    return {f"{shard['file']}": shard["bytes"] for shard in index["shards"]}, index["settings"]["format"]


class _InMemory:
    """All tensors of a shard, by safetensors' own method names."""

    def __init__(self, shard: Any) -> None:
        self._tensors = {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118, not a dict
        self.keys, self.get_slice, self.get_tensor = self._tensors.keys, self._tensors.get, self._tensors.get


def _open(path: Path) -> Any:
    try:
        return safetensors_handle(path)
    except CheckpointError as error:
        raise CheckpointError(f"{error} Or remove {path} and run precompute again.") from error
