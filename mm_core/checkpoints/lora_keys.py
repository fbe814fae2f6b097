"""The layers of CogVideoX that a LoRA may change, and the names that trainers give them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from .comfyui_keys import comfyui_key

TEXT_ENCODER = ("text_encoder", "lora_te")
"""What the keys of the text encoder's layers begin with."""

_PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.", "unet.")
_FLAT_PREFIX = re.compile(r"(lora_unet|lora_transformer|lycoris)_+")
_KEY = re.compile(
    r"(?P<layer>.+)\.(?:(?:lora_(?P<matrix>[AB])(?:\.\w+)?|lora[_.](?P<direction>down|up))\.weight|(?P<alpha>alpha))"
)
_DIRECTIONS = {"A": "down", "B": "up"}


class LoraKey(NamedTuple):
    """What a key of a LoRA file stands for."""

    layer: str
    """The layer in the trainer's spelling, without what stands for the transformer."""
    part: str
    """`down` (the first matrix), `up` (the second) or `alpha` (their scale times the rank)."""


def parse_key(key: str) -> LoraKey | None:
    """The layer and the part behind a key; None where it is no part of a LoRA layer.

    Read are the namings of diffusers and peft (`lora_A`, `lora_B`, with an adapter's name or without), of kohya,
    OneTrainer and VideoX-Fun (`lora_down`, `lora_up`, `alpha`; dots as underscores), and of diffusers before peft
    (`lora.down`).
    """
    match = _KEY.fullmatch(key)
    if match is None:
        return None
    layer = match["layer"]
    for prefix in _PREFIXES:
        layer = layer.removeprefix(prefix)
    flat = _FLAT_PREFIX.match(layer)
    part = match["alpha"] or match["direction"] or _DIRECTIONS[match["matrix"]]
    return LoraKey(layer[flat.end() :] if flat else layer, part)


def spellings(layers: Iterable[str]) -> dict[str, str]:
    """Every spelling of each layer, and its name in diffusers: as there, as in the core of ComfyUI, and both with
    underscores in place of dots."""
    found = {}
    for name in layers:
        for spelling in (name, comfyui_key(f"{name}.").rstrip(".")):
            found |= {spelling: name, spelling.replace(".", "_"): name}
    return found


def layer_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shape of the weight of each linear or convolution layer, by diffusers' name.

    config: the transformer's, under diffusers' names.
    """
    dim = config["num_attention_heads"] * config["attention_head_dim"]
    time, text = config["time_embed_dim"], config["text_embed_dim"]
    size, frames = config.get("patch_size", 2), config.get("patch_size_t")
    patch = size * size * (frames or 1)
    block = {
        "norm1.linear": (6 * dim, time),
        **{f"attn1.{part}": (dim, dim) for part in ("to_q", "to_k", "to_v", "to_out.0")},
        "norm2.linear": (6 * dim, time),
        "ff.net.0.proj": (4 * dim, dim),
        "ff.net.2": (dim, 4 * dim),
    }
    channels = config["in_channels"]
    return {
        "patch_embed.proj": (dim, channels, size, size) if frames is None else (dim, channels * patch),
        "patch_embed.text_proj": (dim, text),
        "time_embedding.linear_1": (time, dim),
        "time_embedding.linear_2": (time, time),
        **{
            f"transformer_blocks.{number}.{part}": shape
            for number in range(config["num_layers"])
            for part, shape in block.items()
        },
        "norm_out.linear": (2 * dim, time),
        "proj_out": (config["out_channels"] * patch, dim),
    }
