"""The forward process of CogVideoX's diffusion, and the positions its transformer is given."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel
from torch import Tensor


def alphas_bar(scheduler: CogVideoXDDIMScheduler) -> Tensor:
    """(1000,) float64, 1 at no noise to exactly 0 (zero terminal SNR)."""
    return scheduler.alphas_cumprod.double()


def add_noise(clean: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """Clean latents, (B, F, C, H, W), with noise of the level that alpha_bar, (B,), gives each of them.

    The schedulers of diffusers cast these levels to the dtype of the latents: in bfloat16 that adds nothing at the
    first two timesteps. This keeps float32 at least.
    """
    # x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise
    dtype = torch.promote_types(clean.dtype, torch.float32)
    shape = (-1, *[1] * (clean.ndim - 1))
    signal, deviation = alpha_bar.sqrt().to(dtype).view(shape), (1 - alpha_bar).sqrt().to(dtype).view(shape)
    return signal * clean.to(dtype) + deviation * noise.to(dtype)


def rotary_embedding(
    transformer: CogVideoXTransformer3DModel, frames: int, height: int, width: int
) -> tuple[Tensor, Tensor] | None:
    """What diffusers' own pipeline gives the transformer for latents of this shape: cos, sin, (tokens, head size)."""
    if not transformer.config.use_rotary_positional_embeddings:
        return None
    # The pipeline's method, so that training and sampling cannot differ; it reads nothing else of the pipeline.
    pipe = SimpleNamespace(transformer=transformer, vae_scale_factor_spatial=1)
    device = torch.device("cpu")
    return CogVideoXPipeline._prepare_rotary_positional_embeddings(pipe, height, width, frames, device)
