"""What a checkpoint holds beside accelerate's own files, and which checkpoint a run goes on from.

Nothing is unpickled: a shared checkpoint could run code. accelerate reads its files with `weights_only`, except those
of registered objects, so these are written and read here.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from safetensors.torch import save_file
from torch import Tensor, nn

from ..checkpoints.safetensors_file import read_tensors
from ..errors import CheckpointError
from .runs import checkpoints, step_of
from .task import Task

_log = logging.getLogger(__name__)

TRAINABLE = "trainable.safetensors"
AVERAGE, STATE = "average.pt", "state.pt"
"""Tensors, numbers and texts, nothing else."""
_DAMAGED = "damaged-"
_SHADOW = "shadow_params"


class SavedState:
    """What a checkpoint holds beside accelerate's own files.

    What the task can read back from what it exported is not written once more: that is the average, or, without one,
    the weights themselves.

    trained: the parameters that are, by name. average: of them, None without.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        folder: Path,
        trained: Mapping[str, nn.Parameter],
        task: Task,
        average: EMAModel | None,
    ) -> None:
        self.accelerator, self.folder, self.trained, self.average = accelerator, folder, trained, average
        self.exported, self.state = task.exported, task.state
        accelerator.register_save_state_pre_hook(self._save)
        accelerator.register_load_state_pre_hook(self._load)

    @property
    def _own_weights(self) -> bool:
        """Whether the weights are written here: they are not what the task reads back."""
        return self.average is not None or self.exported is None

    def resume(self) -> int:
        """Load the last checkpoint that is whole, if there is one; returns the number of steps done.

        A damaged one is put aside under another name, with a warning, and the one before it is taken.
        Raises CheckpointError where there are checkpoints, and none of them can be read.
        """
        damaged: dict[Path, Exception] = {}
        for checkpoint in reversed(checkpoints(self.folder)):
            try:
                self.accelerator.load_state(str(checkpoint))
            except Exception as error:  # damage shows in as many ways as there are readers
                _log.warning("The checkpoint %s cannot be read: %s", checkpoint, error)
                damaged[checkpoint] = error
                continue
            self._put_aside(damaged)
            if damaged:
                _log.warning("The run goes on from %s; what cannot be read is kept as %s*", checkpoint, _DAMAGED)
            return step_of(checkpoint)
        if damaged:
            reasons = "; ".join(f"{path.name}: {error}" for path, error in damaged.items())
            raise CheckpointError(
                f"None of the checkpoints in {next(iter(damaged)).parent} can be read ({reasons}). Copy one of them "
                "again, or remove the folder to begin anew."
            )
        return 0

    def _put_aside(self, damaged: Mapping[Path, Exception]) -> None:
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            for path in damaged:
                kept = path.with_name(_DAMAGED + path.name)
                shutil.rmtree(kept, ignore_errors=True)
                path.rename(kept)

    def _save(self, models: list[nn.Module], weights: list[dict[str, Tensor]], folder: str) -> None:
        """As accelerate calls it. Frozen weights have no place in a checkpoint."""
        weights.clear()
        state = self.state.state_dict() if self.state is not None else None  # may gather from all processes
        if not self.accelerator.is_main_process:
            return
        if state is not None:
            torch.save(state, Path(folder) / STATE)
        if self.average is not None:
            kept = self.average.state_dict()
            torch.save(kept | {_SHADOW: None} if self.exported else kept, Path(folder) / AVERAGE)
        if self._own_weights:
            save_file({name: p.detach().contiguous() for name, p in self.trained.items()}, Path(folder) / TRAINABLE)

    def _load(self, models: list[nn.Module], folder: str) -> None:
        models.clear()
        exported = self._checked(self.exported(Path(folder)), folder) if self.exported else None
        weights = self._checked(read_tensors(Path(folder) / TRAINABLE), folder) if self._own_weights else exported
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(weights[name])
        if self.average is not None:
            state = torch.load(Path(folder) / AVERAGE, map_location="cpu", weights_only=True)
            if exported is not None:
                state[_SHADOW] = [exported[name] for name in self.trained]
            self.average.load_state_dict(state)
        if self.state is not None:
            self.state.load_state_dict(torch.load(Path(folder) / STATE, map_location="cpu", weights_only=True))

    def _checked(self, weights: Mapping[str, Tensor], folder: str) -> Mapping[str, Tensor]:
        if not self.trained.keys() <= weights.keys():
            raise CheckpointError(f"{folder} does not hold the parameters that are trained")
        bad = [name for name in self.trained if not weights[name].isfinite().all()]
        if bad:
            raise CheckpointError(f"{folder} holds values that are no numbers, in {', '.join(bad[:5])}")
        return weights
