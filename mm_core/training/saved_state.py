"""What a checkpoint holds beside accelerate's own files, and which checkpoint a run goes on from.

Nothing is unpickled: a shared checkpoint could run code. accelerate reads its files with `weights_only`, except those
of registered objects, so these are written and read here.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor, nn

from ..checkpoints.safetensors_file import read_tensors
from ..errors import CheckpointError
from .runs import checkpoints, step_of

_log = logging.getLogger(__name__)

TRAINABLE = "trainable.safetensors"
_EXTRA = "state_{}.pt"
"""Tensors, numbers and texts, nothing else."""
_OLDER_EXTRA = "custom_checkpoint_{}.pkl"
"""What accelerate called the same file; it would unpickle one that it finds."""
_DAMAGED = "damaged-"


class Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class SavedState:
    """names: of the trained parameters. extras: what else a resumed run needs, in an order that stays."""

    def __init__(
        self, accelerator: Accelerator, folder: Path, names: Sequence[str], extras: Sequence[Stateful]
    ) -> None:
        self.accelerator, self.folder, self.names, self.extras = accelerator, folder, names, extras
        accelerator.register_save_state_pre_hook(self._save)
        accelerator.register_load_state_pre_hook(self._load)

    def resume(self) -> int:
        """Load the last checkpoint that is whole, if there is one; returns the number of steps done.

        A damaged one is put aside under another name, with a warning, and the one before it is taken.
        Raises CheckpointError where there are checkpoints, and none of them can be read.
        """
        damaged: dict[Path, Exception] = {}
        for checkpoint in reversed(checkpoints(self.folder)):
            try:
                self._rename_older(checkpoint)
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

    def _rename_older(self, checkpoint: Path) -> None:
        if self.accelerator.is_main_process:
            for number in range(len(self.extras)):
                older = checkpoint / _OLDER_EXTRA.format(number)
                if older.is_file():
                    older.rename(checkpoint / _EXTRA.format(number))
        self.accelerator.wait_for_everyone()

    def _put_aside(self, damaged: Mapping[Path, Exception]) -> None:
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            for path in damaged:
                kept = path.with_name(_DAMAGED + path.name)
                shutil.rmtree(kept, ignore_errors=True)
                path.rename(kept)

    def _save(self, models: list[nn.Module], weights: list[dict[str, Tensor]], folder: str) -> None:
        """Frozen weights have no place in a checkpoint. Sharded models (`weights` is empty) are saved by accelerate."""
        states = [extra.state_dict() for extra in self.extras]  # may gather from all processes
        if self.accelerator.is_main_process:
            for number, state in enumerate(states):
                torch.save(state, Path(folder) / _EXTRA.format(number))
            if weights:
                save_file({name: weights[0][name].contiguous() for name in self.names}, Path(folder) / TRAINABLE)
        weights.clear()

    def _load(self, models: list[nn.Module], folder: str) -> None:
        path = Path(folder) / TRAINABLE
        if path.is_file():  # else accelerate has saved a sharded model, or raises
            weights = read_tensors(path)
            if weights.keys() != set(self.names):
                raise CheckpointError(f"{path} does not hold the parameters that are trained")
            bad = [name for name, tensor in weights.items() if not tensor.isfinite().all()]
            if bad:
                raise CheckpointError(f"{path} holds values that are no numbers, in {', '.join(bad[:5])}")
            model = self.accelerator.unwrap_model(models.pop(), keep_torch_compile=False)
            model.load_state_dict(weights, strict=False)
        for number, extra in enumerate(self.extras):
            path = Path(folder) / _EXTRA.format(number)
            extra.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
