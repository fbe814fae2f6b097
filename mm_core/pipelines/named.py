"""What users call a base model: `tiny`, a published name, with its owner or without, or the folder of one.

A published one, and the ID encoder that goes with it, are where `training fetch` and `generate --download` put them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import T5Config

from ..checkpoints.photomaker import COPY_NAME, FILE_NAME
from ..choices import TINY
from ..errors import CheckpointError, SettingError
from ..files import DOWNLOADS
from .base import BaseModel, FolderBase, TinyBase
from .presets import HUB_ADDRESS, PRESETS, T5_XXL, published

FETCH = "run `python -m mm_core.training fetch` with a config that names it"
"""How a model that is missing is fetched, but for `generate`, which fetches by itself."""


def folder_of(name: str) -> Path:
    """Where the base of this name is, or would be."""
    if name == TINY:
        return TinyBase().folder
    preset = published(name)
    return Path(name).expanduser() if preset is None else DOWNLOADS / preset.repo.split("/")[-1]


def base_of(name: str, fetch: str = FETCH) -> BaseModel:
    """The base of this name, not loaded yet. fetch: how the user can have a published one fetched, to be told.

    Raises CheckpointError if it is not here, or lacks files.
    """
    if name == TINY:
        return TinyBase()
    base = FolderBase(folder_of(name))
    if not base.folder.is_dir() and (preset := published(name)) is not None:
        raise CheckpointError(
            f"{name} is not in {base.folder}: {fetch} (20 GB or more, under the model's own licence: "
            f"{HUB_ADDRESS}/{preset.repo}), or give the folder of a copy."
        )
    if not base.folder.is_dir():
        raise CheckpointError(f"There is no base model {name}: give tiny, one of {', '.join(PRESETS)}, or a folder.")
    base.check_complete()
    return base


def id_encoder_for(name: str) -> Path:
    """The ID encoder of a base: PhotoMaker-V2's, wherever it may be here; `tiny` brings its own."""
    if name == TINY:
        return TinyBase().id_encoder
    copy = DOWNLOADS / COPY_NAME
    return copy if copy.is_file() else DOWNLOADS / FILE_NAME


def configs_of(name: str) -> tuple[str, Mapping[str, Any], Mapping[str, Any], T5Config]:
    """Full name, transformer, VAE and T5 of a base, of a published one without its files. Raises SettingError."""
    preset = published(name)
    if preset is not None:
        config = {"patch_size_t": None} | dict(preset.transformer)
        return preset.repo, config, preset.vae, T5Config(**T5_XXL)
    folder = folder_of(name)
    if not folder.is_dir():
        raise SettingError(
            f"The base model is {name}; it must be tiny, one of {', '.join(PRESETS)}, or the folder of a model."
        )
    model = FolderBase(folder)
    return (
        name if name == TINY else folder.name, model.transformer_config, model.vae_config,
        T5Config(**model.text_config),
    )  # fmt: skip
