"""LoRAs on diffusers' pipeline, through its own loader."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import CogVideoXPipeline
from torch import Tensor, nn

from ..checkpoints.lora_file import LoraFile, open_lora
from ..checkpoints.lora_keys import layer_shapes
from ..errors import SettingError
from .base import BaseModel

MAX_STRENGTH = 20
_NAME = "magic_mirror"


@dataclass(frozen=True, kw_only=True)
class Lora:
    """A LoRA for a clip."""

    file: LoraFile
    strength: float
    """1 as trained; 0 is off; below 0 the opposite."""

    @classmethod
    def open(cls, path: Path, strength: float, base: BaseModel) -> Lora:
        """Raises SettingError for a strength out of range, CheckpointError for a file that does not fit the base."""
        if not abs(strength) <= MAX_STRENGTH:
            raise SettingError(f"The LoRA's strength is {strength}; it must be from {-MAX_STRENGTH} to {MAX_STRENGTH}.")
        return cls(file=open_lora(path, layer_shapes(base.transformer_config)), strength=strength)


def set_loras(pipe: CogVideoXPipeline, loras: Sequence[Lora], dtype: torch.dtype) -> None:
    """Let the transformer have exactly these LoRAs: those of before are taken off, and nothing of them is left.

    accelerate's hooks must be off, for they hold the layers that change; group offloading is put right by diffusers.

    Args:
        dtype: what the transformer computes in.
    """
    if getattr(pipe.transformer, "peft_config", None):
        pipe.unload_lora_weights()
    weights = _joined(loras, dtype)
    if not weights:
        return
    pipe.load_lora_weights({f"transformer.{key}.weight": tensor for key, tensor in weights.items()}, adapter_name=_NAME)
    for key, tensor in weights.items():
        matrix = pipe.transformer.get_submodule(key)[_NAME].requires_grad_(False)
        if matrix.weight.dtype != dtype:  # peft takes the type that the base is stored in, such as fp8
            matrix.weight = nn.Parameter(tensor.to(matrix.weight.device), requires_grad=False)


def _joined(loras: Sequence[Lora], dtype: torch.dtype) -> dict[str, Tensor]:
    """The sum of all LoRAs as one, of a rank as large as theirs together; peft's names of its matrices."""
    downs: dict[str, list[Tensor]] = {}
    ups: dict[str, list[Tensor]] = {}
    for lora in loras:
        for name, layer in lora.file.read().items():
            downs.setdefault(f"{name}.lora_A", []).append(layer.down.to(dtype))
            ups.setdefault(f"{name}.lora_B", []).append((layer.up.float() * layer.scale * lora.strength).to(dtype))
    return {key: torch.cat(parts) for key, parts in downs.items()} | {
        key: torch.cat(parts, dim=1) for key, parts in ups.items()
    }
