"""The configs of a CogVideoX folder and its parts: which settings are read, and what each may be.

Nothing else of them reaches diffusers or transformers: no class name, no quantisation, no code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, short
from ..json_file import read_object
from ..limits import POSITION_TABLE_BYTES, SIZES

_DIFFUSERS, _TRANSFORMERS = "diffusers", "transformers"
# What a folder's model_index.json may name. Nothing is imported by these names; another one is a sign of another model,
# or of a folder that is meant to run code elsewhere.
_PIPELINES = ("CogVideoXPipeline", "CogVideoXVideoToVideoPipeline", "CogVideoXImageToVideoPipeline")
_CLASSES = {
    "transformer": (_DIFFUSERS, ("CogVideoXTransformer3DModel",)),
    "vae": (_DIFFUSERS, ("AutoencoderKLCogVideoX",)),
    "scheduler": (_DIFFUSERS, ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler")),
    "text_encoder": (_TRANSFORMERS, ("T5EncoderModel",)),
    "tokenizer": (
        _TRANSFORMERS,
        ("T5Tokenizer", "T5TokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend"),
    ),
}


@dataclass(frozen=True)
class Kind:
    """What a setting may be."""

    wanted: str
    """In words, after "it must be"."""
    fits: Callable[[Any], bool]


def whole(size: str, least: int = 1) -> Kind:
    """A number of `least` to the limit of that name."""
    most = SIZES[size]
    return Kind(f"a whole number from {least} to {most}", lambda v: type(v) is int and least <= v <= most)


def number(least: float, most: float) -> Kind:
    return Kind(
        f"a number from {least:g} to {most:g}",
        lambda v: type(v) in (int, float) and math.isfinite(v) and least <= v <= most,
    )


def one_of(*values: object) -> Kind:
    return Kind(
        " or ".join(map(str, values)), lambda v: any(type(v) is type(value) and v == value for value in values)
    )


def maybe(kind: Kind) -> Kind:
    return Kind(f"{kind.wanted}, or null", lambda v: v is None or kind.fits(v))


def several(kind: Kind, size: str) -> Kind:
    most = SIZES[size]
    return Kind(
        f"a list of 1 to {most}, each {kind.wanted}",
        lambda v: isinstance(v, (list, tuple)) and 1 <= len(v) <= most and all(map(kind.fits, v)),
    )


SWITCH = Kind("true or false", lambda v: type(v) is bool)
_EPSILON = number(0, 1)

TRANSFORMER = {
    "num_attention_heads": whole("num_attention_heads"),
    "attention_head_dim": whole("attention_head_dim"),
    "in_channels": whole("channels"),
    "out_channels": whole("channels"),
    "flip_sin_to_cos": SWITCH,
    "freq_shift": number(0, 16),
    "time_embed_dim": whole("embed_dim"),
    "ofs_embed_dim": maybe(whole("embed_dim")),
    "text_embed_dim": whole("embed_dim"),
    "num_layers": whole("num_layers"),
    "dropout": number(0, 1),
    "attention_bias": SWITCH,
    "sample_width": whole("latent_side"),
    "sample_height": whole("latent_side"),
    "sample_frames": whole("frames"),
    "patch_size": whole("patch"),
    "patch_size_t": maybe(whole("patch")),
    "temporal_compression_ratio": one_of(4),
    "max_text_seq_length": whole("tokens", least=4),
    "activation_fn": one_of("gelu-approximate", "gelu", "geglu", "geglu-approximate", "swiglu"),
    "timestep_activation_fn": one_of("silu", "swish", "mish", "gelu", "relu"),
    "norm_elementwise_affine": SWITCH,
    "norm_eps": _EPSILON,
    "spatial_interpolation_scale": number(0.01, 100),
    "temporal_interpolation_scale": number(0.01, 100),
    "use_rotary_positional_embeddings": SWITCH,
    "use_learned_positional_embeddings": SWITCH,
    "patch_bias": SWITCH,
}
VAE = {
    "in_channels": one_of(3),
    "out_channels": one_of(3),
    "down_block_types": several(one_of("CogVideoXDownBlock3D"), "depth"),
    "up_block_types": several(one_of("CogVideoXUpBlock3D"), "depth"),
    "block_out_channels": several(whole("channels"), "depth"),
    "latent_channels": whole("channels"),
    "layers_per_block": whole("depth"),
    "act_fn": one_of("silu", "swish", "mish", "gelu", "relu"),
    "norm_eps": _EPSILON,
    "norm_num_groups": whole("channels"),
    "temporal_compression_ratio": one_of(4, 4.0),
    "sample_height": whole("pixel_side"),
    "sample_width": whole("pixel_side"),
    "scaling_factor": number(1e-6, 1e6),
    "shift_factor": maybe(number(-1e6, 1e6)),
    "latents_mean": maybe(several(number(-1e6, 1e6), "channels")),
    "latents_std": maybe(several(number(1e-6, 1e6), "channels")),
    "force_upcast": Kind("true or false", lambda v: type(v) in (bool, float, int)),
    "use_quant_conv": SWITCH,
    "use_post_quant_conv": SWITCH,
    "invert_scale_latents": SWITCH,
}
TEXT_ENCODER = {
    "vocab_size": whole("vocabulary"),
    "d_model": whole("embed_dim"),
    "d_kv": whole("attention_head_dim"),
    "d_ff": whole("feed_forward"),
    "num_layers": whole("num_layers"),
    "num_heads": whole("num_attention_heads"),
    "relative_attention_num_buckets": whole("queries", least=4),
    "relative_attention_max_distance": whole("tokens", least=4),
    "dropout_rate": number(0, 1),
    "layer_norm_epsilon": _EPSILON,
    "feed_forward_proj": one_of("gated-gelu", "gated-silu", "gelu", "relu"),
}
SCHEDULER = {
    "num_train_timesteps": whole("train_timesteps"),
    "beta_start": number(0, 1),
    "beta_end": number(0, 1),
    "beta_schedule": one_of("linear", "scaled_linear", "squaredcos_cap_v2"),
    "trained_betas": maybe(several(number(0, 1), "train_timesteps")),
    "clip_sample": SWITCH,
    "clip_sample_range": number(0, 1e6),
    "set_alpha_to_one": SWITCH,
    "steps_offset": Kind("0 or 1", lambda v: type(v) is int and v in (0, 1)),
    "prediction_type": one_of("v_prediction", "epsilon", "sample"),
    "sample_max_value": number(0, 1e6),
    "timestep_spacing": one_of("trailing", "leading", "linspace"),
    "rescale_betas_zero_snr": SWITCH,
    "snr_shift_scale": number(0.01, 100),
}


def checked(config: Mapping[str, Any], kinds: Mapping[str, Kind], where: str) -> dict[str, Any]:
    """The known settings of a config. Raises CheckpointError that lists those which are not what they may be."""
    if "quantization_config" in config:
        raise CheckpointError(f"{where} is of quantised weights, which are not read. Use the model's own weights.")
    known = {name: config[name] for name in kinds if name in config}
    wrong = [
        f"{name} is {short(value)}; it must be {kinds[name].wanted}"
        for name, value in known.items()
        if not kinds[name].fits(value)
    ]
    if wrong:
        raise CheckpointError(f"{where} is damaged or of another model: {'. '.join(wrong)}. Download it again.")
    return known


def check_index(path: Path) -> None:
    """Raise CheckpointError where a folder's model_index.json names other classes than CogVideoX's."""
    index = read_object(path)
    named = {"the pipeline": index.get("_class_name")}
    named |= {part: index[part] for part in index if not part.startswith("_")}
    for part, name in named.items():
        library, classes = _CLASSES.get(part, (None, ()))
        allowed = [[library, cls] for cls in classes] if part in _CLASSES else [[None, None]]
        if name not in (_PIPELINES if part == "the pipeline" else allowed):
            raise CheckpointError(
                f"{path} names {str(name)[:100]} for {part[:100]}, which no CogVideoX text-to-video model has. "
                "Nothing of it was loaded. Use a folder from a source that you trust."
            )


def check_positions(config: Mapping[str, Any], where: str) -> None:
    """Raise CheckpointError for a transformer whose positions cannot be made, or would not fit into memory.

    config: with all settings.
    """
    size = config["attention_head_dim"]
    if config["use_rotary_positional_embeddings"] and size % 16:
        raise CheckpointError(f"{where}: attention_head_dim is {size}; rotary positions need a multiple of 16.")
    if config["use_learned_positional_embeddings"] or not config["use_rotary_positional_embeddings"]:
        patch, frames = config["patch_size"], (config["sample_frames"] - 1) // config["temporal_compression_ratio"] + 1
        tokens = (config["sample_height"] // patch) * (config["sample_width"] // patch) * frames
        table = 4 * tokens * size * config["num_attention_heads"]
        if table > POSITION_TABLE_BYTES:
            raise CheckpointError(
                f"{where}: sample_height, sample_width and sample_frames ask for a table of positions of {table:,} "
                f"bytes; at most {POSITION_TABLE_BYTES:,} are made. Download it again."
            )
