"""Latents to frames. A clip that took an hour to sample is never lost because its decode did not fit."""

from __future__ import annotations

import functools
import gc
import inspect
import logging
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import torch
from diffusers import AutoencoderKLCogVideoX
from torch import Tensor

from ..counting import counted
from ..errors import DecodeError
from ..numerics import precision_name, remedy
from ..out_of_memory import is_out_of_memory
from .presets import TEMPORAL_COMPRESSION, spatial_compression

log = logging.getLogger(__name__)

# Whole frames first, then tiles of these parts of the VAE's own training size.
_TILES = (None, 1 / 2, 1 / 4, 1 / 8)
_OVERLAP = 1 / 4
_MARGIN = 1.1  # what the kernels need for themselves, and what the allocator wastes


@torch.no_grad()
def decode(
    vae: AutoencoderKLCogVideoX, latents: Tensor, device: torch.device, free: int | None = None
) -> Tensor:
    """(1, C, F, H, W) latents -> (frames, H, W, 3) float RGB in 0..1 on the CPU.

    Whole frames where they fit, else tiles. They run out of memory all the same? Then smaller ones.

    Args:
        free: bytes of the device; None where nobody can tell, and all are tried.

    Raises:
        DecodeError: the smallest tiles did not fit either, or frames are not finite; it carries the latents.
    """
    first = None if free is None else choose_tiles(vae.config, vae.dtype, latents.shape, free)
    if first is not None:
        log.info("MagicMirror decodes in tiles of %s of the size: %.1f GB are free.", first, free / 1e9)
    for part in _TILES[_TILES.index(first) :]:
        try:
            if part is not None:
                _tile(vae, part)
            latents = latents.to(device, vae.dtype)
            video = vae.decode(1 / vae.config.scaling_factor * latents).sample[0].cpu().float()
            if not video.isfinite().all():
                raise _not_finite(latents)
            return (video * 0.5 + 0.5).clamp(0, 1).permute(1, 2, 3, 0)
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


def choose_tiles(config: Mapping[str, Any], dtype: torch.dtype, shape: Sequence[int], free: int) -> float | None:
    """The largest tiles that `free` bytes allow, as a part of the VAE's training size; None for whole frames, and the
    smallest where nothing fits. shape: of the latents."""
    fits = (part for part in _TILES if _MARGIN * decode_bytes(config, dtype, shape, part) <= free)
    return next(fits, _TILES[-1])


def decode_bytes(config: Mapping[str, Any], dtype: torch.dtype, shape: Sequence[int], part: float | None) -> int:
    """Bytes that decoding holds at most, beside the weights.

    Args:
        config: of the VAE.
        shape: (1, C, F, H, W), of the latents.
        part: as in `choose_tiles`.
    """
    _, _, frames, height, width = shape
    cell = spatial_compression(config)
    key = as_key(AutoencoderKLCogVideoX, config)
    tile = (height, width) if part is None else tuple(side // cell for side in _tile_size(config, part))
    if height <= tile[0] and width <= tile[1]:
        return _whole_bytes(key, dtype, frames, height, width)
    steps = [int(side * (1 - _OVERLAP)) for side in tile]
    cells = [
        min(tile[0], height - y) * min(tile[1], width - x)
        for y, x in product(range(0, height, steps[0]), range(0, width, steps[1]))
    ]
    largest = _whole_bytes(key, dtype, frames, min(tile[0], height), min(tile[1], width))
    pictures = (frames - 1) * TEMPORAL_COMPRESSION + 1
    made = 3 * pictures * cell**2 * dtype.itemsize  # of one latent cell: RGB of all frames
    peaks = [made * sum(cells[:number]) + largest * size / max(cells) for number, size in enumerate(cells)]
    # In the end all tiles are there, the rows of the picture, and the picture.
    return int(max(*peaks, made * (sum(cells) + 2 * height * width)))


Key = tuple[tuple[str, Any], ...]


def as_key(cls: type, config: Mapping[str, Any]) -> Key:
    """All settings of a class, those that a config leaves out too, to count with once."""
    parameters = inspect.signature(cls.__init__).parameters.values()
    settings = [(item.name, config.get(item.name, item.default)) for item in parameters if item.name != "self"]
    return tuple(
        (name, tuple(value) if isinstance(value, list) else value)
        for name, value in settings
        if value is not inspect.Parameter.empty
    )


@functools.lru_cache(maxsize=64)
def _whole_bytes(config: Key, dtype: torch.dtype, frames: int, height: int, width: int) -> int:
    """The same of whole frames, in latent cells. After five latent frames it grows no more: they come in pairs."""
    with torch.device("meta"):
        vae = torch.nn.Module.to(AutoencoderKLCogVideoX(**dict(config)), dtype).eval()
        channels, frames = vae.config.latent_channels, min(frames, 4 + frames % 2)
        with counted() as live:
            vae.decode(torch.empty(1, channels, frames, height, width, dtype=dtype))
    return live.peak


def _tile_size(config: Mapping[str, Any], part: float) -> tuple[int, int]:
    """Height and width in pixels: of `part` of the training size, in multiples of 32."""
    return tuple(max(32, int(config[side] * part) // 32 * 32) for side in ("sample_height", "sample_width"))


def _tile(vae: torch.nn.Module, part: float) -> None:
    """Tiles that overlap by a quarter.

    diffusers rounds a tile's overlap down, in latents and in pixels apart: where these differ, as its own fractions do
    for most sizes, the tiles do not fit together and the frames come out stretched. These are always whole numbers.
    """
    height, width = _tile_size(vae.config, part)
    vae.enable_tiling(
        tile_sample_min_height=height,
        tile_sample_min_width=width,
        tile_overlap_factor_height=_OVERLAP,
        tile_overlap_factor_width=_OVERLAP,
    )
