"""Latents to frames. A clip that took an hour to sample is never lost because its decode did not fit."""

from __future__ import annotations

import gc
import logging

import torch
from diffusers import AutoencoderKLCogVideoX
from torch import Tensor

from ..errors import DecodeError
from ..numerics import precision_name, remedy
from ..out_of_memory import is_out_of_memory

log = logging.getLogger(__name__)

# Whole frames first, then tiles of these parts of the VAE's own training size.
_TILES = (None, 1 / 2, 1 / 4, 1 / 8)


@torch.no_grad()
def decode(vae: AutoencoderKLCogVideoX, latents: Tensor, device: torch.device) -> Tensor:
    """(1, C, F, H, W) latents -> (frames, H, W, 3) float RGB in 0..1 on the CPU.

    Runs out of memory with whole frames? Then with tiles, then with smaller ones.

    Raises:
        DecodeError: the smallest tiles did not fit either, or frames are not finite; it carries the latents.
    """
    for part in _TILES:
        try:
            if part is not None:
                _tile(vae, part)
            latents = latents.to(device, vae.dtype)
            video = vae.decode(1 / vae.config.scaling_factor * latents).sample
            if not video.isfinite().all():
                raise _not_finite(latents)
            return (video[0].float() * 0.5 + 0.5).clamp(0, 1).permute(1, 2, 3, 0).cpu()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            log.warning("Decoding %s ran out of memory; trying smaller tiles.", part or "whole frames")
            message = str(error)
        finally:
            vae.disable_tiling()
        # Outside the handler: the traceback would keep the failed attempt's tensors alive.
        gc.collect()
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()
    raise DecodeError(
        "The clip is sampled, but there is not enough memory to decode it, even in tiles of "
        f"{_TILES[-1]:.0%} of the size: {message}. Close other programs or use a stronger "
        "offloading, then decode the latents.",
        latents.cpu(),
    )


def _not_finite(latents: Tensor) -> DecodeError:
    if not latents.isfinite().all():
        what, do = "The latents that were to be decoded", "They are no clip: sample it again."
    else:
        what, do = "The clip is sampled, but its decoded frames", "Then decode the latents."
    return DecodeError(
        f"{what} are not finite (NaN or infinity), in {precision_name(latents.dtype)}. {remedy(latents.dtype)} {do}",
        latents.cpu(),
    )


def _tile(vae: torch.nn.Module, part: float) -> None:
    """Tiles of `part` of the training size, in multiples of 32 px, overlapping by a quarter.

    diffusers rounds a tile's overlap down, in latents and in pixels apart: where these differ, as its own fractions do
    for most sizes, the tiles do not fit together and the frames come out stretched. These are always whole numbers.
    """
    sizes = (vae.config.sample_height, vae.config.sample_width)
    height, width = (max(32, int(size * part) // 32 * 32) for size in sizes)
    vae.enable_tiling(
        tile_sample_min_height=height,
        tile_sample_min_width=width,
        tile_overlap_factor_height=1 / 4,
        tile_overlap_factor_width=1 / 4,
    )
