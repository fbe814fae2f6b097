"""What the loop trains: a model, its batches, what is written of it and how it is measured."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .loop_config import LoopConfig
from .optimizer import adamw


class State(Protocol):
    """What else a resumed run needs: tensors, numbers and texts."""

    def state_dict(self) -> dict[str, Any]:
        """Called in all processes; the first one's is kept."""

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Task(ABC):
    """A training; what is abstract here it must bring."""

    model: nn.Module
    """Its `forward(batch)` returns per-sample values by name, (B,) each; the mean of `loss` is minimised. The ones with
    NaN for a sample are averaged over the others. Parameters that require gradients are trained, no others."""

    state: State | None = None

    settings: Mapping[str, Any] = MappingProxyType({})
    """What else the numbers of a run depend on, by name. A run goes on only with the same."""

    exported: Callable[[Path], Mapping[str, Tensor]] | None = None
    """Reads what `export` was given back from that folder, bit for bit, so that a checkpoint has it once; None: it
    cannot be read back."""

    @property
    def compiled(self) -> nn.Module:
        """What `LoopConfig.compile` compiles."""
        return self.model

    def optimizers(self, config: LoopConfig) -> Sequence[torch.optim.Optimizer]:
        """Of the model's parameters that require gradients, each in one of them."""
        return [adamw(self.model, config)]

    @abstractmethod
    def batch(self, samples: range) -> Any:
        """The samples with these numbers, as nested dicts and lists of tensors; the same whenever and by whom ever, in
        a process beside the training's too."""

    @abstractmethod
    def export(self, weights: Mapping[str, Tensor], path: Path, step: int) -> None:
        """Write the trained weights, by the model's parameter names, in the format others read, into a folder."""

    @abstractmethod
    def validate(self, step: int, folder: Path) -> dict[str, float]:
        """Measure the model as it is (its weights are the average while this runs); files go into the folder.

        In all processes, which may share the work."""
