"""Where a run's ID encoder and features are: what the names in its config mean on this machine."""

from __future__ import annotations

from pathlib import Path

from ..pipelines.named import id_encoder_for
from .config import TrainingConfig


def id_encoder_of(config: TrainingConfig) -> Path:
    """The ID encoder that a config names, else the base's."""
    return id_encoder_for(config.base) if config.id_encoder is None else Path(config.id_encoder).expanduser()


def features_of(config: TrainingConfig, stage: str) -> Path:
    """The folder of a stage's features."""
    return Path(config.stage(stage).features).expanduser()
