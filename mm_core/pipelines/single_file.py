"""Which part of a published base model a single `.safetensors` file holds, told by its tensors, not by its name."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from transformers import T5Config, T5EncoderModel

from ..checkpoints.safetensors_file import Shapes, tensor_shapes
from ..errors import CheckpointError
from .presets import PRESETS, T5_XXL

# A key that every file of the part has: other files are not worth building the models to compare with.
_MARKS = {
    "transformer": "transformer_blocks.0.norm1.linear.weight",
    "text_encoder": "shared.weight",
    "vae": "decoder.conv_in.conv.weight",
}
_TIED = "encoder.embed_tokens.weight"
"""The copy of T5's `shared.weight`, which a file need not hold."""


def recognise(path: Path, part: str) -> str | None:
    """The model whose tensors a file holds, under diffusers' names; None if the file is damaged or holds none of them.

    part: "transformer", "text_encoder" or "vae".
    """
    try:
        return model_of(tensor_shapes(path), part)
    except CheckpointError:
        return None


def model_of(shapes: Shapes, part: str) -> str | None:
    """The model that has exactly these tensors; None if there is none."""
    if _MARKS[part] not in shapes:
        return None
    for name, expected in _expected(part).items():
        if shapes == {key: shape for key, shape in expected.items() if key in shapes or key != _TIED}:
            return name
    return None


@cache
def _expected(part: str) -> dict[str, Shapes]:
    """The models that a single file of this part may hold."""
    with torch.device("meta"):
        if part == "transformer":
            models = {preset.repo: CogVideoXTransformer3DModel(**preset.transformer) for preset in PRESETS.values()}
        elif part == "vae":  # all of them have the same tensors
            models = {"CogVideoX's VAE": AutoencoderKLCogVideoX(**PRESETS["CogVideoX-5b"].vae)}
        else:
            models = {"T5-v1.1-XXL": T5EncoderModel(T5Config(**T5_XXL))}
    return {
        name: {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()} for name, model in models.items()
    }
