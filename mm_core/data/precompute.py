"""What the frozen models make of a data set, once, before training: latents, prompts, faces, identities.

A sample that cannot be used is left out, counted by reason; nothing is replaced. Work is done in shards of
SAMPLES_PER_SHARD lines of the manifest, each written whole; who is killed goes on with those that are missing.
`features.Features` reads the result and says what is in it.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ..errors import CheckpointError, MagicMirrorError, SettingError
from ..files import PARTIAL, write_bytes, write_json
from ..json_file import read_object
from ..memory import on_device
from .features import INDEX, KINDS, ROWS, SETTINGS
from .frozen import FeatureSettings, FrozenModels
from .index import Shard, build_index
from .manifest import Sample, manifest_path, read_manifest

SAMPLES_PER_SHARD = 64
Progress = Callable[[str, int, int], None]
"""What is being made, one of KINDS, how many of its shards are done, and of how many."""


def is_made(settings: FeatureSettings, folder: Path) -> bool:
    """Whether a folder has all features of a data set. Raises SettingError as `precompute`."""
    _check_settings(folder, _wanted(settings))
    return (folder / INDEX).is_file()


def precompute(
    settings: FeatureSettings,
    folder: Path,
    on_progress: Progress = lambda what, done, of: None,
    *,
    rank: int = 0,
    world_size: int = 1,
) -> bool:
    """Write a process's share of a data set's features; whether the folder is complete with them.

    Any number of processes, on any machines that share the folder, make the same files: every `world_size`-th shard is
    of a `rank`, and who finds the last one there writes the index. They need not know of each other.

    Raises:
        SettingError: no manifest, a wrong line in it, or a folder with features made by other settings or weights.
        MagicMirrorError: the disk is full or will be; not one sample can be used; a value that is not finite.
        CheckpointError: missing or damaged models.
    """
    if not 0 <= rank < world_size:
        raise SettingError(f"The rank is {rank} of {world_size}; it must be from 0 to below the number of processes.")
    manifest = manifest_path(settings.data)
    items = _Items.of(read_manifest(manifest))
    folder.mkdir(parents=True, exist_ok=True)
    wanted = _wanted(settings)
    _check_settings(folder, wanted)
    _check_space(folder, settings, items)
    mine = items.shards[rank::world_size]
    missing = [shard for shard in mine if not (folder / shard.file).is_file()]
    if missing:
        maker = FrozenModels(settings, manifest.parent)
        wanted["weights"] = maker.fingerprint()
        if not _check_settings(folder, wanted):
            write_json(folder / SETTINGS, wanted)
        _make(maker, folder, mine, on_progress)
    if not all((folder / shard.file).is_file() for shard in items.shards):
        return False
    if not (folder / INDEX).is_file():
        index = build_index(folder, items.samples, items.shards)
        with suppress(FileNotFoundError):  # who was quicker has written the same, and swept
            write_json(folder / INDEX, index)
    for left_by_a_killed_run in folder.glob(f".*{PARTIAL}"):
        left_by_a_killed_run.unlink(missing_ok=True)
    return True


def _make(maker: FrozenModels, folder: Path, shards: Sequence[Shard], on_progress: Progress) -> None:
    """Write those shards that are not there yet."""
    of, done = Counter(shard.kind for shard in shards), Counter()
    make = {"prompts": maker.prompt_shard, "references": maker.reference_shard, "samples": maker.sample_shard}
    with on_device(maker.modules, maker.device), torch.no_grad():
        for shard in shards:
            path = folder / shard.file
            if not path.is_file():
                write_shard(path, *make[shard.kind](shard.items))
            done[shard.kind] += 1
            on_progress(shard.kind, done[shard.kind], of[shard.kind])


@dataclass(frozen=True, kw_only=True)
class _Items:
    """What is made, in shards: the same for every process."""

    samples: list[Sample]
    shards: list[Shard]

    @classmethod
    def of(cls, samples: list[Sample]) -> _Items:
        distinct = {
            "prompts": list(dict.fromkeys(["", *(sample.caption for sample in samples)])),
            "references": list(dict.fromkeys(path for sample in samples for path in sample.references)),
            "samples": samples,
        }
        shards = [
            Shard(kind=kind, number=number, items=items[first : first + SAMPLES_PER_SHARD])
            for kind, items in distinct.items()
            for number, first in enumerate(range(0, len(items), SAMPLES_PER_SHARD))
        ]
        return cls(samples=samples, shards=shards)

    def count(self, kind: str) -> int:
        return sum(len(shard.items) for shard in self.shards if shard.kind == kind)


def _wanted(settings: FeatureSettings) -> dict[str, Any]:
    """What the settings of a folder must be, beside the weights."""
    return settings.to_json(manifest_path(settings.data)) | {"samples_per_shard": SAMPLES_PER_SHARD}


def _check_settings(folder: Path, wanted: dict[str, Any]) -> bool:
    """A folder holds the features of one manifest, one size, one set of weights; whether it says so already."""
    path, begun = folder / SETTINGS, any(folder.glob("*.safetensors"))  # shards come after the settings
    if not path.is_file():
        if begun:
            raise SettingError(f"{folder} holds other files than features; choose an empty folder.")
        return False
    try:
        found = read_object(path)
    except CheckpointError as error:
        raise SettingError(f"{error} Or remove {folder} and run this again.") from error
    differing = [name for name, value in wanted.items() if found.get(name) != value]
    if differing:
        name = differing[0]
        raise SettingError(
            f"{folder} was made with another {name}: {found.get(name)}, not {wanted[name]}. Choose another folder for "
            "`features`, or remove this one."
        )
    return True


def _check_space(folder: Path, settings: FeatureSettings, items: _Items) -> None:
    """Raises MagicMirrorError if what is still to be written does not fit."""
    written = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    counts = {kind: items.count(kind) for kind in KINDS}
    needed = max(0, sum(counts[kind] * size for kind, size in settings.bytes_of_items().items()) - written)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise MagicMirrorError(
            f"The features of {', '.join(f'{count} {kind}' for kind, count in counts.items())} need about "
            f"{needed / 1e9:.2f} GB more in {folder}, where {free / 1e9:.2f} GB are free. Free some, or choose a "
            "`features` folder on another disk."
        )


def write_shard(path: Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    """Whole or not at all. header: `rows`, their names, and `skipped`, what was left out and why."""
    # One entry only: safetensors writes several in no fixed order.
    write_bytes(path, save(tensors, {ROWS: json.dumps(header)}))
