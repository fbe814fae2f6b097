"""Where models are looked for, and how they are found there by name. Plain Python: the nodes' menus are made of it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import CheckpointError
from .faces.packs import USUAL_PACKS, onnx_files
from .limits import NAME_LENGTH
from .names import is_below, stays_within
from .pipelines.presets import PRESETS

_TRANSFORMER = "transformer/config.json"
"""What a folder in diffusers' layout is known by."""


@dataclass(frozen=True, kw_only=True)
class Folders:
    """Where to look for each kind of model. Of several folders the first is where a missing file should go; a kind
    without folders is left out."""

    base_models: tuple[Path, ...] = ()
    """Hold models in diffusers' folder layout, one or two levels deep."""
    diffusion_models: tuple[Path, ...] = ()
    text_encoders: tuple[Path, ...] = ()
    vae: tuple[Path, ...] = ()
    """Hold base models as single files, part by part."""
    photomaker: tuple[Path, ...] = ()
    adapters: tuple[Path, ...] = ()
    faces: tuple[Path, ...] = ()
    """Hold `models/<pack>/*.onnx`."""

    @classmethod
    def in_comfyui(cls, models: Path) -> Folders:
        """ComfyUI's `models` folder as it is when nobody has changed its paths."""
        return cls(
            base_models=(models / "CogVideo", models / "diffusers"),
            diffusion_models=(models / "diffusion_models", models / "unet"),
            text_encoders=(models / "text_encoders", models / "clip"),
            vae=(models / "vae",),
            photomaker=(models / "photomaker",),
            adapters=(models / "magic_mirror",),
            faces=(models / "insightface",),
        )


def check_name(name: object) -> None:
    """Raise CheckpointError for what is no name of something within a folder; see `stays_within`."""
    if not stays_within(name):
        shown = repr(name)
        raise CheckpointError(
            f"{shown if len(shown) <= 100 else shown[:100] + '...'} is no name of a model: it must be one of the list, "
            f"or a path below its folder, without `..`, at most {NAME_LENGTH} characters long."
        )


def find_folder(roots: Sequence[Path], name: str) -> Path | None:
    """The diffusers folder of that name, relative to one of the roots.

    A folder that the list has may be a link, which the owner of the machine made; another one must lie below its root.
    Raises CheckpointError for a name that leads out of them.
    """
    check_name(name)
    for root in roots:
        folder = root / name
        if (folder / _TRANSFORMER).is_file() and (folder in _folders_in(root) or is_below(folder, root)):
            return folder
    return None


def hub_folder(roots: Sequence[Path], repo: str) -> Path:
    """Where a model of the hub is, or should be put."""
    own_name = repo.rpartition("/")[2]
    return find_folder(roots, repo) or find_folder(roots, own_name) or roots[0] / own_name


def other_folders(roots: Sequence[Path]) -> list[str]:
    """Names, for `find_folder`, of the diffusers folders that are no published model's."""
    published = {hub_folder(roots, preset.repo) for preset in PRESETS.values()} if roots else set()
    return [
        folder.relative_to(root).as_posix()
        for root in roots
        for folder in _folders_in(root)
        if folder not in published
    ]


def _folders_in(root: Path) -> list[Path]:
    """The diffusers folders in a root."""
    configs = [*root.glob(f"*/{_TRANSFORMER}"), *root.glob(f"*/*/{_TRANSFORMER}")]
    return [config.parents[1] for config in sorted(configs)]


def find_face_packs(roots: Sequence[Path]) -> list[str]:
    """insightface's usual packs, and the others that are there."""
    found = [folder.name for root in roots for folder in sorted((root / "models").glob("*")) if onnx_files(folder)]
    return list(dict.fromkeys([*USUAL_PACKS, *found]))


def walk(roots: Sequence[Path], *suffixes: str) -> Iterator[Path]:
    """Files below the roots, links followed as ComfyUI does, each once."""
    seen = set()
    for root in roots:
        for folder, subfolders, names in os.walk(root, followlinks=True):
            subfolders.sort()
            for name in sorted(names):
                path = Path(folder, name)
                if name.lower().endswith(suffixes) and path not in seen and path.is_file():
                    seen.add(path)
                    yield path
