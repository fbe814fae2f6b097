"""A stage in training, as those see it who measure it: the type, apart from how a stage is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from diffusers import CogVideoXPipeline
from torch import Tensor

from ..data.features import Features
from ..pipelines.base import BaseModel
from .config import StageConfig, TrainingConfig
from .step import AdapterTraining


class TrainedStage(Protocol):
    """What `adapter_task.AdapterTask` holds."""

    config: TrainingConfig
    stage: StageConfig
    base: BaseModel
    features: Features
    validation: np.ndarray
    """Rows of the features of people who are left out of training."""
    pipe: CogVideoXPipeline
    model: AdapterTraining
    alphas_bar: Tensor

    def draw(self, row: int, number: int, whole: bool = False) -> dict[str, Tensor]: ...

    def stacked(self, drawn: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]: ...
