"""Latents to frames. A clip that took an hour to sample is never lost because its decode did not fit."""

from __future__ import annotations

import gc
import logging

import torch
from diffusers import CogVideoXPipeline
from torch import Tensor

from ..errors import DecodeError

log = logging.getLogger(__name__)

# Whole frames first, then tiles of these parts of the VAE's own training size.
_TILES = (None, 1 / 2, 1 / 4, 1 / 8)


@torch.no_grad()
def decode(pipe: CogVideoXPipeline, latents: Tensor) -> Tensor:
    """(1, C, F, H, W) latents -> (frames, H, W, 3) float RGB in 0..1 on the CPU.

    Runs out of memory with whole frames? Then with tiles, then with smaller ones.

    Raises:
        DecodeError: the smallest tiles did not fit either; it carries the latents.
    """
    vae = pipe.vae
    for part in _TILES:
        try:
            if part is not None:
                _tile(vae, part)
            latents = latents.to(pipe._execution_device, vae.dtype)
            video = vae.decode(latents / vae.config.scaling_factor).sample
            return ((video[0].float() + 1) / 2).clamp(0, 1).permute(1, 2, 3, 0).cpu()
        except torch.OutOfMemoryError as error:
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


def _tile(vae: torch.nn.Module, part: float) -> None:
    """Tiles of `part` of the training size, at least 32 px, in multiples of 16."""
    height, width = (
        max(32, int(side * part) // 16 * 16) for side in (vae.config.sample_height, vae.config.sample_width)
    )
    vae.enable_tiling(tile_sample_min_height=height, tile_sample_min_width=width)
