"""A rough picture of a clip while it is being sampled: a linear map from latent channels to RGB."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import AutoencoderKLCogVideoX
from PIL import Image
from torch import Tensor

_PATCHES = 27
_PATCH = 32


@torch.no_grad()
def fit_latent_rgb(vae: AutoencoderKLCogVideoX) -> Tensor:
    """Fit the map to a VAE by least squares on flat colours that it encodes: (C + 1, 3), the last row a constant.

    Every VAE gets its own map this way, a fine-tuned one too, in one small encode.
    """
    generator = torch.Generator().manual_seed(0)
    colours = torch.rand(_PATCHES, 3, generator=generator)  # RGB in 0..1
    weight = next(vae.parameters())
    video = (colours * 2 - 1)[:, :, None, None, None].expand(-1, -1, 1, _PATCH, _PATCH).to(weight.device, weight.dtype)
    latents = torch.cat([vae.encode(patch).latent_dist.mean for patch in video.split(8)]) * vae.config.scaling_factor
    latents = latents.float().cpu().mean(dim=(2, 3, 4))  # (patches, C)
    return torch.linalg.lstsq(_with_constant(latents), colours, driver="gelsd").solution


def preview_image(latents: Tensor, latent_rgb: Tensor) -> Image.Image:
    """The middle frame of (1, F, C, H, W) latents as a small picture, one pixel for each latent."""
    frame = latents[0, latents.shape[1] // 2].float().cpu().permute(1, 2, 0)  # (H, W, C)
    rgb = (_with_constant(frame) @ latent_rgb).clamp(0, 1)
    return Image.fromarray((rgb.numpy() * 255).astype(np.uint8))


def _with_constant(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones_like(x[..., :1])], dim=-1)
