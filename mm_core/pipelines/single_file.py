"""Published base models as single `.safetensors` files, one for each part: told by its tensors, not by its name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXTransformer3DModel,
)
from transformers import PreTrainedTokenizerBase, T5Config, T5EncoderModel

from ..checkpoints.safetensors_file import Shapes, tensor_shapes
from ..errors import CheckpointError
from .base import BaseModel
from .parts import build_scheduler
from .presets import PRESETS, T5_XXL, Preset
from .tokenizer import load_tokenizer

# A key that every file of the part has: other files are not worth building the models to compare with.
_MARKS = {
    "transformer": "transformer_blocks.0.norm1.linear.weight",
    "text_encoder": "shared.weight",
    "vae": "decoder.conv_in.conv.weight",
}
_TIED = "encoder.embed_tokens.weight"
"""The copy of T5's `shared.weight`, which a file need not hold."""


@dataclass(frozen=True, kw_only=True)
class FileBase(BaseModel):
    """A model as single files with diffusers' key names."""

    transformer: Path
    text_encoder: Path
    """T5-XXL, as in `t5xxl_fp16.safetensors`."""
    vae: Path
    tokenizer_folder: Path
    """A folder with a T5 tokenizer (`tokenizer.json` or `spiece.model`)."""

    @property
    def name(self) -> str:
        return self.transformer.name

    @cached_property
    def preset(self) -> Preset:
        """The published model whose tensors are exactly those of the file."""
        repo = model_of(tensor_shapes(self.transformer), "transformer")
        for preset in PRESETS.values():
            if preset.repo == repo:
                return preset
        raise CheckpointError(
            f"The tensors of {self.transformer.name} are not those of {', '.join(PRESETS)} under diffusers' names. Use "
            "a diffusers folder, or a file converted from one."
        )

    @property
    def transformer_config(self) -> Mapping[str, Any]:
        return {"patch_size_t": None, "max_text_seq_length": 226} | self.preset.transformer

    @property
    def vae_config(self) -> Mapping[str, Any]:
        return self.preset.vae

    @property
    def text_config(self) -> Mapping[str, Any]:
        return T5_XXL

    @property
    def transformer_files(self) -> list[Path]:
        return [self.transformer]

    @property
    def vae_files(self) -> list[Path]:
        return [self.vae]

    @property
    def text_encoder_files(self) -> list[Path]:
        return [self.text_encoder]

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.tokenizer_folder)

    def load_scheduler(self) -> CogVideoXDDIMScheduler | CogVideoXDPMScheduler:
        return build_scheduler(self.preset.scheduler, "CogVideoXDDIMScheduler")


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
