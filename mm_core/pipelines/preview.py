"""A rough picture of a clip while it is being sampled: a linear map from latent channels to RGB."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLCogVideoX
from PIL import Image
from torch import Tensor

from ..files import write_json
from ..memory import on_device

LATENT_RGB = "latent_rgb.json"
"""The file of a map that comes with a model."""
_PICTURES, _SIZE, _BLOBS, _BATCH = 16, 64, 6, 8


class LatentPreview:
    """Draws previews of one VAE's latents. Its map is fitted when the first one is drawn, unless it is known.

    Args:
        vae: may be offloaded.
        device: where to fit.
        known: (C + 1, 3), a map that was fitted before.
    """

    def __init__(self, vae: AutoencoderKLCogVideoX, device: torch.device, *, known: Tensor | None = None) -> None:
        self._vae, self._device, self._map = vae, device, known

    def draw(self, latents: Tensor) -> Image.Image:
        """The middle frame of (1, F, C, H, W) latents as a small picture, one pixel for each latent."""
        if self._map is None:
            # Not as a part in its turn: the transformer is in the middle of its own.
            with on_device([self._vae.encoder], self._device):
                self._map = fit_latent_rgb(self._vae, self._device)
        return preview_image(latents, self._map)


@torch.no_grad()
def fit_latent_rgb(vae: AutoencoderKLCogVideoX, device: torch.device) -> Tensor:
    """Fit the map to a VAE by least squares on pictures of coloured blobs that it encodes: (C + 1, 3), the last row a
    constant.

    Every VAE gets its own map this way, a fine-tuned one too, in one small encode. Blobs, not flat colours: the VAE's
    group norms take a flat picture's colour away.
    """
    generator = torch.Generator().manual_seed(0)
    colours = torch.rand(_PICTURES, 3, _BLOBS, _BLOBS, generator=generator)  # RGB in 0..1
    pictures = F.interpolate(colours, size=(_SIZE, _SIZE), mode="bilinear")
    encoder, dtype = vae.encoder, vae.dtype
    if device.type == "cpu" and dtype != torch.float32:  # a CPU takes minutes to hours in the narrow types
        encoder, dtype = copy.deepcopy(encoder).float(), torch.float32
    video = (pictures * 2 - 1)[:, :, None].to(device, dtype)
    # The encoder itself, not `vae.encode`: that would call offloading's hook, which sends the transformer away.
    moments = torch.cat([encoder(part)[0] for part in video.split(_BATCH)])
    latents = moments.chunk(2, dim=1)[0] * vae.config.scaling_factor  # the means
    latents = latents[:, :, 0].float().cpu()  # (pictures, C, h, w)
    seen = F.adaptive_avg_pool2d(pictures, latents.shape[-2:])
    rows, wanted = (x.permute(0, 2, 3, 1).flatten(0, 2) for x in (latents, seen))
    return torch.linalg.lstsq(_with_constant(rows), wanted, driver="gelsd").solution


def save_latent_rgb(latent_rgb: Tensor, path: Path) -> None:
    """JSON: a list of C + 1 RGB triples."""
    write_json(path, [[round(value, 6) for value in row] for row in latent_rgb.tolist()])


def load_latent_rgb(path: Path) -> Tensor | None:
    """What `save_latent_rgb` wrote; None without a file: the map is fitted then."""
    return torch.tensor(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def preview_image(latents: Tensor, latent_rgb: Tensor) -> Image.Image:
    """The middle frame of (1, F, C, H, W) latents as a small picture, one pixel for each latent."""
    frame = latents[0, latents.shape[1] // 2].float().cpu().permute(1, 2, 0)  # (H, W, C)
    rgb = (_with_constant(frame) @ latent_rgb).nan_to_num().clamp(0, 1)
    return Image.fromarray((rgb.numpy() * 255).astype(np.uint8))


def _with_constant(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones_like(x[..., :1])], dim=-1)
