"""Core's CogVideoX, computing as it was trained. For core with `comfy.ldm.cogvideo`.

Core stretches the positions of CogVideoX 1.0, has another position table than 2B's, takes 2B for a model without one,
knows the noise levels of 5B only, and samples in a space that its own samplers do not know. Patches of a clone put all
of it right.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import comfy.ldm.cogvideo.model
import comfy.model_sampling
import comfy.patcher_extension
import torch.nn.functional as F
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..mm_core.errors import CheckpointError
from ..mm_core.numerics import FiniteWatch
from ..mm_core.pipelines.presets import Sampling
from .native_sampling import DDIM, compute_dtype, watched

if TYPE_CHECKING:
    from ..mm_core.pipelines.base import BaseModel

_KEY = "magic_mirror_base"
_DIM_2B = 1920
_ZERO_SNR = 4.8973451890853435e-08
"""alpha_bar where there is no signal at all: core's own number, from which a sigma can still be made."""


class CogVideoXSampling(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.V_PREDICTION):
    """v-prediction as core's samplers know it: they add the noise, and the model gets latents of unit variance."""

    steps: int
    """How many suit the base model."""


def transformer_of(model: ModelPatcher) -> Any:
    """Core's transformer. Raises CheckpointError for another model."""
    transformer = model.model.diffusion_model
    if not isinstance(transformer, comfy.ldm.cogvideo.model.CogVideoXTransformer3DModel):
        raise CheckpointError(
            f"The model is {type(transformer).__name__}, not CogVideoX: this node is for CogVideoX text-to-video."
        )
    return transformer


def config_of(model: ModelPatcher) -> dict[str, Any]:
    """The sizes of core's transformer, under diffusers' names. Raises CheckpointError for another model."""
    transformer = transformer_of(model)
    blocks = transformer.blocks
    names = ("num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "patch_size", "patch_size_t")
    return {
        **{name: getattr(transformer, name) for name in names},
        "num_layers": len(blocks),
        "time_embed_dim": blocks[0].norm1.linear.in_features,
        "text_embed_dim": transformer.patch_embed.text_proj.in_features,
    }


def corrected(model: ModelPatcher, base: BaseModel) -> ModelPatcher:
    """A clone of the MODEL that computes as diffusers does; the base's configs tell how it was trained.

    Raises:
        CheckpointError: the MODEL is not CogVideoX, or not the base.
    """
    config = config_of(model)
    wrong = [
        f"{name} {base.transformer_config[name]} and {value}"
        for name, value in config.items()
        if base.transformer_config.get(name, value) != value
    ]
    if wrong:
        raise CheckpointError(
            f"Load MagicMirror has {base.name}, and the MODEL is another one: {', '.join(wrong)}. Choose one model."
        )
    model = model.clone()
    _correct_positions(model, base.transformer_config)
    # Where the user has set another sampling, that one stays.
    if isinstance(model.get_model_object("model_sampling"), comfy.model_sampling.V_PREDICTION_DDPM | CogVideoXSampling):
        _correct_sampling(model, base)
    return model


def check_known(model: ModelPatcher) -> None:
    """Raise CheckpointError for a MODEL that is not CogVideoX, or that is 2B as core's loader has it."""
    is_corrected = isinstance(model.get_model_object("model_sampling"), CogVideoXSampling)
    if transformer_of(model).dim == _DIM_2B and not is_corrected:
        raise CheckpointError(
            "This MODEL is CogVideoX-2b from ComfyUI's own loader, which takes it for a model with 5b's positions and "
            "noise levels. Use CogVideoX Model (MagicMirror, native), or put Apply CAN Adapter (MagicMirror, native) "
            "before this node."
        )


def sampling_steps(model: ModelPatcher) -> int:
    """How many denoising steps suit the MODEL; the published ones, when it is not known better."""
    return getattr(model.get_model_object("model_sampling"), "steps", Sampling.steps)


def _correct_sampling(model: ModelPatcher, base: BaseModel) -> None:
    alpha_bar = base.load_scheduler().alphas_cumprod.double().clamp(min=_ZERO_SNR)
    sampling = CogVideoXSampling(model.model.model_config)
    sampling.set_sigmas(((1 - alpha_bar) / alpha_bar).sqrt())
    sampling.steps = base.sampling.steps
    model.add_object_patch("model_sampling", sampling)
    kind = comfy.patcher_extension.WrappersMP.SAMPLER_SAMPLE
    model.remove_wrappers_with_key(kind, _KEY)
    model.add_wrapper_with_key(kind, _KEY, _sample)


def _sample(
    executor: Any, model_wrap: Any, sigmas: Tensor, extra_args: dict[str, Any], callback: Any, *arguments: Any
) -> Tensor:
    """Core's own DDIM for CogVideoX adds no noise, and takes the model for one that core's samplers do not know; ours
    is the same otherwise. The steps of all others are watched as ours are."""
    sampler = executor.class_obj
    if type(sampler).__name__ == "VOID_DDIM":
        return DDIM().sample(model_wrap, sigmas, extra_args, callback, *arguments)
    if not isinstance(sampler, DDIM):
        callback = watched(callback, FiniteWatch(len(sigmas) - 1, compute_dtype(model_wrap.model_patcher)))
    return executor(model_wrap, sigmas, extra_args, callback, *arguments)


def _correct_positions(model: ModelPatcher, config: Any) -> None:
    """config: the transformer's, under diffusers' names."""
    transformer = transformer_of(model)
    if config["use_rotary_positional_embeddings"]:
        if transformer.patch_size_t is None:
            model.add_object_patch("diffusion_model._get_rotary_emb", functools.partial(_rotary_of_1_0, transformer))
        return
    embed = "diffusion_model.patch_embed"
    model.add_object_patch("diffusion_model.use_rotary_positional_embeddings", False)
    model.add_object_patch(f"{embed}.use_positional_embeddings", False)
    model.add_object_patch(f"{embed}.forward", functools.partial(_embed_with_table, transformer.patch_embed))


def _rotary_of_1_0(transformer: Any, height: int, width: int, frames: int, device: Any) -> tuple[Tensor, Tensor]:
    """diffusers' positions for a clip of so many patches."""
    from diffusers.models.embeddings import get_3d_rotary_pos_embed
    from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

    embed = transformer.patch_embed
    trained = (embed.sample_width // transformer.patch_size, embed.sample_height // transformer.patch_size)
    return get_3d_rotary_pos_embed(
        embed_dim=transformer.attention_head_dim,
        crops_coords=get_resize_crop_region_for_grid((height, width), *trained),
        grid_size=(height, width),
        temporal_size=frames,
        device=device,
    )


def _embed_with_table(embed: Any, text: Tensor, latents: Tensor) -> Tensor:
    """Core's patch embedding without its own positions, and diffusers' on the video's tokens.

    text: (B, T, Dtxt). latents: (B, F, C, H, W). Returns (B, T + N, D).
    """
    from diffusers.models.embeddings import get_3d_sincos_pos_embed

    tokens = type(embed).forward(embed, text, latents)
    _, frames, _, height, width = latents.shape
    table = get_3d_sincos_pos_embed(
        embed.dim,
        (width // embed.patch_size, height // embed.patch_size),
        frames,
        embed.spatial_interpolation_scale,
        embed.temporal_interpolation_scale,
        device=tokens.device,
        output_type="pt",
    ).flatten(0, 1)
    return tokens + F.pad(table.to(tokens), (0, 0, text.shape[1], 0))
