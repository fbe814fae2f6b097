"""A rough picture of a clip while it is being sampled: a linear map from latent channels to RGB."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLCogVideoX
from PIL import Image
from torch import Tensor

_PICTURES, _SIZE, _BLOBS = 16, 64, 6


@torch.no_grad()
def fit_latent_rgb(vae: AutoencoderKLCogVideoX) -> Tensor:
    """Fit the map to a VAE by least squares on pictures of coloured blobs that it encodes: (C + 1, 3), the last row a
    constant.

    Every VAE gets its own map this way, a fine-tuned one too, in one small encode. Blobs, not flat colours: the VAE's
    group norms take a flat picture's colour away.
    """
    generator = torch.Generator().manual_seed(0)
    colours = torch.rand(_PICTURES, 3, _BLOBS, _BLOBS, generator=generator)  # RGB in 0..1
    pictures = F.interpolate(colours, size=(_SIZE, _SIZE), mode="bilinear")
    weight = next(vae.parameters())
    video = (pictures * 2 - 1)[:, :, None].to(weight.device, weight.dtype)
    latents = torch.cat([vae.encode(part).latent_dist.mean for part in video.split(8)]) * vae.config.scaling_factor
    latents = latents[:, :, 0].float().cpu()  # (pictures, C, h, w)
    seen = F.adaptive_avg_pool2d(pictures, latents.shape[-2:])
    rows, wanted = (x.permute(0, 2, 3, 1).flatten(0, 2) for x in (latents, seen))
    return torch.linalg.lstsq(_with_constant(rows), wanted, driver="gelsd").solution


def preview_image(latents: Tensor, latent_rgb: Tensor) -> Image.Image:
    """The middle frame of (1, F, C, H, W) latents as a small picture, one pixel for each latent."""
    frame = latents[0, latents.shape[1] // 2].float().cpu().permute(1, 2, 0)  # (H, W, C)
    rgb = (_with_constant(frame) @ latent_rgb).clamp(0, 1)
    return Image.fromarray((rgb.numpy() * 255).astype(np.uint8))


def _with_constant(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones_like(x[..., :1])], dim=-1)
