"""How large the small model is made: those of the `tiny` preset, or larger ones for who has a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mm_core.pipelines import tiny


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """pixels: of a side, a multiple of 16. frames: 8N + 1. width: of VAE and transformer, times that of `tiny`."""

    pixels: int = tiny.SIZE
    frames: int = tiny.NUM_FRAMES
    width: int = 1

    @property
    def latent_frames(self) -> int:
        return (self.frames - 1) // 4 + 1

    @property
    def vae(self) -> dict[str, Any]:
        channels = tuple(self.width * count for count in tiny.VAE["block_out_channels"])
        return tiny.VAE | dict(block_out_channels=channels, sample_height=self.pixels, sample_width=self.pixels)

    @property
    def transformer(self) -> dict[str, Any]:
        side = self.pixels // 4
        heads = self.width * tiny.TRANSFORMER["num_attention_heads"]
        sizes = dict(num_attention_heads=heads, sample_frames=self.frames, sample_height=side, sample_width=side)
        return tiny.TRANSFORMER | sizes
