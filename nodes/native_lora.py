"""LoRAs on core's CogVideoX, whose names core has no table for. For core with `comfy.ldm.cogvideo`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import comfy.lora
import torch

from ..mm_core.errors import CheckpointError
from .native_base import config_of

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

    from ..mm_core.checkpoints.lora_file import LoraFile


def open_for(model: ModelPatcher, path: Path) -> LoraFile:
    """Raises CheckpointError for a MODEL that is not CogVideoX, or a file that does not fit it."""
    from ..mm_core.checkpoints.lora_file import open_lora
    from ..mm_core.checkpoints.lora_keys import layer_shapes

    return open_lora(path, layer_shapes(config_of(model)))


def with_lora(model: ModelPatcher, lora: LoraFile, strength: float) -> ModelPatcher:
    """A clone of the MODEL with a LoRA, as core's own loader would put it on."""
    from ..mm_core.checkpoints.comfyui_keys import comfyui_key

    targets, tensors = {}, {}
    for name, layer in lora.read().items():
        targets[name] = "diffusion_model." + comfyui_key(f"{name}.weight")
        tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = layer.down, layer.up
        tensors[f"{name}.alpha"] = torch.tensor(layer.scale * len(layer.down))
    model = model.clone()
    put_on = model.add_patches(comfy.lora.load_lora(tensors, targets), strength)
    missing = set(targets.values()) - set(put_on)
    if missing:
        raise CheckpointError(f"{lora.path.name} has {len(missing)} layers that this MODEL lacks: {min(missing)}.")
    return model
