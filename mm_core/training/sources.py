"""Where a run's frozen models and data are: what the names in its config mean on this machine."""

from __future__ import annotations

from pathlib import Path

from ..checkpoints.photomaker import COPY_NAME, FILE_NAME
from ..errors import CheckpointError
from ..files import DOWNLOADS
from ..pipelines import tiny
from ..pipelines.base import BaseModel, FolderBase, TinyBase
from ..pipelines.presets import Preset, published
from .config import TrainingConfig

FETCH = "Run `python -m mm_core.training fetch` with the same config"


def published_base(config: TrainingConfig) -> Preset | None:
    """The published model that a config names as its base, with its owner or without; None for another base."""
    return published(config.base)


def base_folder(config: TrainingConfig) -> Path:
    """Of the base: a published one's is where `fetch`, and `generate`, put it."""
    preset = published_base(config)
    return Path(config.base).expanduser() if preset is None else DOWNLOADS / preset.repo.split("/")[-1]


def base_of(config: TrainingConfig) -> BaseModel:
    """The base model that a config names, not loaded yet. Raises CheckpointError if its folder lacks files."""
    if config.base == tiny.NAME:
        return TinyBase()
    base = FolderBase(base_folder(config))
    if published_base(config) is not None and not base.folder.is_dir():
        raise CheckpointError(f"{config.base} is not in {base.folder}. {FETCH}, or give a copy's folder as `base`.")
    base.check_complete()
    return base


def id_encoder_of(config: TrainingConfig) -> Path:
    """The ID encoder that a config names, else PhotoMaker-V2's where `fetch` puts it; `tiny` brings its own."""
    if config.id_encoder is not None:
        return Path(config.id_encoder).expanduser()
    if config.base == tiny.NAME:
        return TinyBase().id_encoder
    copy = DOWNLOADS / COPY_NAME
    return copy if copy.is_file() else DOWNLOADS / FILE_NAME


def features_of(config: TrainingConfig, stage: str) -> Path:
    """The folder of a stage's features."""
    return Path(config.stage(stage).features).expanduser()
