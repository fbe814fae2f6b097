"""Pictures and latents as ComfyUI has them, to arrays and back; the only place that does it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..mm_core.errors import MagicMirrorError
from ..mm_core.picture_file import check_pixels, over_grey


def photos_from_images(
    batches: Iterable[Tensor | None], masks: Iterable[Tensor | None] = (None,) * 9
) -> Iterator[np.ndarray]:
    """Batches of pictures, (B, H, W, 3 or 4) from 0 to 1, as photos, (H, W, 3) uint8; what is not connected is None.

    masks: one for each batch, (B or 1, H, W), 1 where a picture is transparent, as core's Load Image gives it; there,
    and where a fourth channel says so, becomes grey what the command line shows as grey too.
    Raises MagicMirrorError for what is no picture.
    """
    number = 0
    for batch, mask in zip(batches, masks, strict=False):
        if batch is None:
            continue
        _check_batch(batch)
        for row, image in enumerate(batch):
            number += 1
            check_pixels(f"picture {number}", *image.shape[:2])
            if not bool(torch.isfinite(image).all()):
                raise MagicMirrorError(
                    f"picture {number} has values that are no numbers (NaN or infinite). A node before this one "
                    "failed; use its input instead, or another photo"
                )
            pixels = _to_bytes(image)
            transparent = None if mask is None else _mask_of(mask, row, image, number)
            if transparent is not None:
                alpha = 255 - _to_bytes(transparent)[..., None]
                if pixels.shape[2] == 4:
                    alpha = np.minimum(alpha, pixels[..., 3:])
                pixels = np.concatenate([pixels[..., :3], alpha], axis=2)
            yield np.array(over_grey(Image.fromarray(pixels))) if pixels.shape[2] == 4 else pixels


def count_pictures(batches: Iterable[Tensor | None]) -> int:
    """How many pictures batches hold, before any is converted. Raises MagicMirrorError as `photos_from_images`."""
    connected = [batch for batch in batches if batch is not None]
    for batch in connected:
        _check_batch(batch)
    return sum(map(len, connected))


def _check_batch(batch: Tensor) -> None:
    if not isinstance(batch, Tensor) or batch.ndim != 4:
        what = f"of shape {tuple(batch.shape)}" if isinstance(batch, Tensor) else f"a {type(batch).__name__}"
        raise MagicMirrorError(
            f"pictures are wanted, (batch, height, width, channels), not what is connected, {what}. A mask becomes a "
            "picture by Convert Mask to Image"
        )
    if not len(batch):
        raise MagicMirrorError("the batch of pictures is empty: 0 pictures. Connect at least one")
    if batch.shape[3] not in (3, 4):
        raise MagicMirrorError(
            f"the pictures have {batch.shape[3]} channels; 3 (RGB) or 4 (with transparency) are wanted. Load the photo "
            "with Load Image"
        )


def _to_bytes(values: Tensor) -> np.ndarray:
    return (values.float().clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()


def _mask_of(mask: Tensor, row: int, image: Tensor, number: int) -> Tensor | None:
    """The mask of one picture, (H, W); None where it hides nothing, of whatever size: Load Image's without alpha."""
    if not bool(mask.any()):
        return None
    own = mask[min(row, len(mask) - 1)] if mask.ndim == 3 else mask
    if not bool(torch.isfinite(own).all()):
        raise MagicMirrorError(
            f"the mask of picture {number} has values that are no numbers (NaN or infinite). Connect the mask of the "
            "same Load Image"
        )
    if own.shape != image.shape[:2]:
        raise MagicMirrorError(
            f"the mask of picture {number} has the shape {tuple(own.shape)}, its picture {tuple(image.shape[:2])} "
            "(height, width). Connect the mask of the same Load Image"
        )
    return own


def image_from_photos(photos: np.ndarray) -> Tensor:
    """(B, H, W, 3) uint8 -> IMAGE."""
    return torch.from_numpy(photos.astype(np.float32) / 255)


def sound_from_audio(audio: Mapping[str, Any]) -> tuple[Tensor, int]:
    """AUDIO -> (channels, samples) and the samples per second; of a batch the first. What cannot be played stays."""
    waveform, rate = audio["waveform"], audio["sample_rate"]
    return (waveform[0] if waveform.ndim == 3 and len(waveform) else waveform), rate


def latent_from_samples(samples: Tensor, scaling_factor: float) -> dict[str, Tensor]:
    """Sampled latents, (1, C, F, h, w) -> LATENT on the scale that core's VAE Decode takes."""
    return {"samples": samples / scaling_factor}
