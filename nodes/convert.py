"""Pictures and latents as ComfyUI has them, to arrays and back; the only place that does it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def photos_from_images(batches: Iterable[Tensor | None]) -> Iterator[np.ndarray]:
    """Batches of pictures, (B, H, W, C) from 0 to 1, as photos, (H, W, 3) uint8; what is not connected is None."""
    for batch in batches:
        if batch is not None:
            for image in batch:
                yield (image[..., :3].float().clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()


def image_from_photos(photos: np.ndarray) -> Tensor:
    """(B, H, W, 3) uint8 -> IMAGE."""
    return torch.from_numpy(photos).float() / 255


def sound_from_audio(audio: Mapping[str, Any]) -> tuple[Tensor, int]:
    """AUDIO -> (channels, samples) and the samples per second; of a batch the first. What cannot be played stays."""
    waveform, rate = audio["waveform"], audio["sample_rate"]
    return (waveform[0] if waveform.ndim == 3 and len(waveform) else waveform), rate


def latent_from_samples(samples: Tensor, scaling_factor: float) -> dict[str, Tensor]:
    """Sampled latents, (1, C, F, h, w) -> LATENT on the scale that core's VAE Decode takes."""
    return {"samples": samples / scaling_factor}
