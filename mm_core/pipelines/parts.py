"""The parts of a base model, each built by its own class from checked settings and loaded strictly from its files.

A folder's own words never choose a class: a class name in a `model_index.json` would be imported, and run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)
from torch import nn
from transformers import T5Config, T5EncoderModel

from ..checkpoints.safetensors_file import check_tensors, open_safetensors, read_weight, shapes_in, tensor_shapes
from ..errors import CheckpointError
from .quantised import Quantiser

_Module = TypeVar("_Module", bound=nn.Module)
_SCHEDULERS = {cls.__name__: cls for cls in (CogVideoXDDIMScheduler, CogVideoXDPMScheduler)}
_TIED = {"encoder.embed_tokens.weight": "shared.weight"}
"""T5's two names of one tensor: a file holds either or both, and the first is read."""
_FLOAT32_IN_HALF = ".wo.weight"
"""T5's feed-forward ends in values beyond float16: transformers keeps these weights in float32 there, as is done here.
"""


class Pipeline(CogVideoXPipeline):
    """diffusers' pipeline that is told where it computes. It would take the device of the first weight, which may rest
    elsewhere."""

    execution_device: torch.device | None = None

    @property
    def _execution_device(self) -> torch.device:
        return self.execution_device or super()._execution_device


Pipeline.__name__ = CogVideoXPipeline.__name__  # which `save_pretrained` writes, for others to find the class by

def load_transformer(
    config: Mapping[str, Any], files: Sequence[Path], dtype: torch.dtype, quantised: str | None = None
) -> CogVideoXTransformer3DModel:
    """config: checked settings. quantised: see `load_strictly`. Raises CheckpointError for files that are not exactly
    its tensors."""
    transformer = _transformer(config, files)
    embed = transformer.patch_embed
    if not (config.get("use_rotary_positional_embeddings") or config.get("use_learned_positional_embeddings")):
        # The sine table of 2B is computed, not stored: it must not stay on `meta`.
        table = embed._get_positional_embeddings(embed.sample_height, embed.sample_width, embed.sample_frames)
        embed.register_buffer("pos_embedding", table, persistent=False)
    return load_strictly(transformer, files, dtype, quantised=quantised)


def check_transformer(config: Mapping[str, Any], files: Sequence[Path]) -> None:
    """Raises CheckpointError for files that are not exactly the tensors of these settings; reads their headers only."""
    _check_headers(_transformer(config, files), files)


def _transformer(config: Mapping[str, Any], files: Sequence[Path]) -> CogVideoXTransformer3DModel:
    return _built(lambda: CogVideoXTransformer3DModel(**config), files)


def load_vae(config: Mapping[str, Any], files: Sequence[Path], dtype: torch.dtype) -> AutoencoderKLCogVideoX:
    """config: checked settings. Raises CheckpointError for files that are not exactly its tensors."""
    return load_strictly(_built(lambda: AutoencoderKLCogVideoX(**config), files), files, dtype)


def load_text_encoder(
    config: Mapping[str, Any], files: Sequence[Path], dtype: torch.dtype, quantised: str | None = None
) -> T5EncoderModel:
    """config: checked settings. quantised: see `load_strictly`. Raises CheckpointError for files that are not exactly
    its tensors."""
    encoder = _built(lambda: T5EncoderModel(T5Config(**config)), files)
    load_strictly(encoder, files, dtype, tied=_TIED, quantised=quantised)
    encoder.set_input_embeddings(encoder.shared)  # one tensor in the memory, under both names
    return encoder


def build_scheduler(config: Mapping[str, Any], name: str) -> CogVideoXDDIMScheduler | CogVideoXDPMScheduler:
    """name: of its class. Raises CheckpointError for another one than CogVideoX's two, or settings that do not fit."""
    if name not in _SCHEDULERS:
        raise CheckpointError(f"The scheduler is {name!r}; a CogVideoX model has {' or '.join(_SCHEDULERS)}.")
    try:
        return _SCHEDULERS[name](**config)
    except Exception as error:
        raise CheckpointError(f"The scheduler's settings do not fit each other: {error}.") from error


def load_strictly(
    module: _Module,
    files: Sequence[Path],
    dtype: torch.dtype,
    *,
    tied: Mapping[str, str] = MappingProxyType({}),
    quantised: str | None = None,
) -> _Module:
    """Load files into a module on `meta`, frozen. Headers are compared before any weight is read.

    Args:
        tied: names of one tensor, copy to original; a file may hold either.
        quantised: one of `choices.QUANTISED`, in which to store its blocks.

    Raises CheckpointError for a tensor that is missing, unexpected, of another shape, or not of finite numbers.
    """
    _check_headers(module, files, tied)
    quantiser = None if quantised is None else Quantiser(module, quantised, dtype)
    weights = {}
    for path in files:
        with open_safetensors(path) as file:
            for key in shapes_in(file):
                weight = read_weight(file, key, path, stored_dtype(key, dtype))
                if quantiser is None or not quantiser.take(key, weight):
                    weights[key] = weight
    for copy, original in tied.items():
        one = weights.get(copy, weights.get(original))
        weights[copy] = weights[original] = one
    module.load_state_dict(weights, assign=True, strict=quantiser is None)
    return module.requires_grad_(False).eval()


def _check_headers(module: nn.Module, files: Sequence[Path], tied: Mapping[str, str] = MappingProxyType({})) -> None:
    expected = {key: tensor.shape for key, tensor in module.state_dict().items()}
    found: dict[str, tuple[int, ...]] = {}
    for path in files:
        found |= tensor_shapes(path)
    names = [{copy, original} for copy, original in tied.items()]
    optional = {key for pair in names if pair & found.keys() for key in pair}
    check_tensors(files[0], {k: s for k, s in expected.items() if k in found or k not in optional}, found)


def stored_dtype(key: str, dtype: torch.dtype) -> torch.dtype:
    """The type in which a tensor of a part is kept where the part is to have `dtype`."""
    return torch.float32 if dtype == torch.float16 and key.endswith(_FLOAT32_IN_HALF) else dtype


def _built(build: Callable[[], _Module], files: Sequence[Path]) -> _Module:
    """A module on `meta`."""
    try:
        with torch.device("meta"):
            return build()
    except Exception as error:  # diffusers has many ways of saying that sizes do not fit each other
        folder = files[0].parent
        raise CheckpointError(f"The settings of {folder} do not fit each other: {error}. Download it again.") from error
