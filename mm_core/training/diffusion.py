"""CogVideoX's diffusion: noise, the clean latents that a prediction means, and the positions of its transformer.

Computed in float32 at least: the schedulers of diffusers round the noise level to the dtype of the latents, in bfloat16
to none at the first two timesteps.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel
from torch import Tensor


def alphas_bar(scheduler: CogVideoXDDIMScheduler) -> Tensor:
    """(1000,) float64, 1 at no noise to exactly 0 (zero terminal SNR)."""
    return scheduler.alphas_cumprod.double()


def add_noise(clean: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """Clean latents, (B, F, C, H, W), with noise of the level that alpha_bar, (B,), 0 to 1, gives each of them."""
    # x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise
    clean, noise = at_least_float32(clean), at_least_float32(noise)
    signal, deviation = signal_and_deviation(alpha_bar, clean)
    return signal * clean + deviation * noise


def predict_clean(prediction: Tensor, noisy: Tensor, alpha_bar: Tensor) -> Tensor:
    """The clean latents that a prediction of v means, which the identity loss decodes.

    Args:
        prediction, noisy: (B, F, C, H, W), as the result: what the transformer says, and what it was given.
        alpha_bar: (B,), 0 to 1.
    """
    # x0 = sqrt(alpha_bar) * x_t - sqrt(1 - alpha_bar) * v
    prediction, noisy = at_least_float32(prediction), at_least_float32(noisy)
    signal, deviation = signal_and_deviation(alpha_bar, noisy)
    return signal * noisy - deviation * prediction


def at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def signal_and_deviation(alpha_bar: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
    """`sqrt(alpha_bar)` and `sqrt(1 - alpha_bar)` in the latents' dtype, shaped to multiply them."""
    if not ((alpha_bar >= 0) & (alpha_bar <= 1)).all():
        raise ValueError(f"alpha_bar must be 0..1, not {alpha_bar.tolist()}: pass the scheduler's alphas_cumprod")
    if alpha_bar.shape != latents.shape[:1]:
        raise ValueError(f"alpha_bar must be (B,) = ({len(latents)},), not {tuple(alpha_bar.shape)}")
    # 1 - alpha_bar before rounding: the scheduler keeps alphas_cumprod in float64.
    factors = (alpha_bar.sqrt(), (1 - alpha_bar).sqrt())
    return tuple(factor.to(latents).view(-1, *[1] * (latents.ndim - 1)) for factor in factors)


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
