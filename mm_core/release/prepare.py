"""A stage's data before it is trained on: what it is looked at with, and what its features are made by."""

from __future__ import annotations

from collections.abc import Callable

from ..data.check import Report, check_dataset
from ..data.precompute import FeatureSettings
from ..files import write_json
from ..pipelines.named import base_of
from ..training.config import TrainingConfig
from ..training.sources import data_of, face_models_of, id_encoder_of, output_of


def feature_settings(config: TrainingConfig, stage: str) -> FeatureSettings:
    """What `precompute` takes, of a stage. Raises CheckpointError."""
    settings = config.stage(stage)
    return FeatureSettings(
        data=data_of(config, stage),
        width=config.width,
        height=config.height,
        frames=settings.frames,
        base=base_of(config.base),
        id_encoder=id_encoder_of(config),
        face_models=face_models_of(config),
        face_pack=config.face_pack,
    )


def check(
    config: TrainingConfig, stage: str, on_progress: Callable[[int, int], None] = lambda done, all_samples: None
) -> Report:
    """Look at all of a stage's data, before anything is trained on it; the report is also `check-<stage>.json`.

    on_progress(done, samples). Raises SettingError if there is no manifest.
    """
    settings, output = feature_settings(config, stage), output_of(config)
    report = check_dataset(
        settings.data,
        width=settings.width,
        height=settings.height,
        frames=settings.frames,
        fps=settings.base.limits.fps,
        check_caption=settings.tokens,
        on_progress=on_progress,
    )
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / f"check-{stage}.json", report.to_json())
    return report
