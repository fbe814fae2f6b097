"""Where the folders and models of a run are: what the names in its config mean on this machine."""

from __future__ import annotations

from pathlib import Path

from ..errors import SettingError
from ..faces.analysis import FaceAnalyzer
from ..pipelines.named import FETCH, id_encoder_for
from .config import TrainingConfig


def output_of(config: TrainingConfig) -> Path:
    """The folder of all that a run writes."""
    return Path(config.output).expanduser()


def data_of(config: TrainingConfig, stage: str) -> Path:
    """The folder of a stage's dataset, or the manifest in it that the config names."""
    return Path(config.stage(stage).data).expanduser()


def features_of(config: TrainingConfig, stage: str) -> Path:
    """The folder of a stage's features."""
    return Path(config.stage(stage).features).expanduser()


def id_encoder_of(config: TrainingConfig) -> Path:
    """The ID encoder that a config names, else the base's."""
    return id_encoder_for(config.base) if config.id_encoder is None else Path(config.id_encoder).expanduser()


def face_models_of(config: TrainingConfig) -> Path:
    """The folder that holds `models`, and in there the face pack."""
    return Path(config.insightface_root).expanduser()


def face_analyzer(config: TrainingConfig) -> FaceAnalyzer:
    """By the config's face pack. Raises CheckpointError where it is missing."""
    return FaceAnalyzer(face_models_of(config), config.face_pack, fetch=FETCH)


def recogniser_file(config: TrainingConfig) -> Path:
    """The recognition network of the config's face pack. Raises SettingError where there is none."""
    folder = face_models_of(config) / "models" / config.face_pack
    found = sorted(path for pattern in ("w600k*.onnx", "glintr*.onnx") for path in folder.glob(pattern))
    if not found:
        raise SettingError(f"{folder} holds no recogniser (w600k_*.onnx, glintr*.onnx): the identity loss needs one.")
    return found[0]
