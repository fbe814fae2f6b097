"""What CogVideoX's block is in either library."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CogVideoXModulation:
    """The parts of `BlockParts` that diffusers and core call by the same names."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block

    def modulation(self, temb: Tensor) -> Tensor:
        temb = F.silu(temb)
        # phi_vid, phi_txt: each norm predicts shift, scale, gate of the video, then of the text.
        halves = [norm.linear(temb).unflatten(-1, (2, 3, -1)) for norm in (self.block.norm1, self.block.norm2)]
        return torch.cat(halves, dim=2)  # (B, 2, 6, D)

    def video_shift(self, temb: Tensor) -> Tensor:
        return self.block.norm1.linear(F.silu(temb)).chunk(6, dim=-1)[0]

    def norm1(self, tokens: Tensor) -> Tensor:
        return self.block.norm1.norm(tokens)

    def norm2(self, tokens: Tensor) -> Tensor:
        return self.block.norm2.norm(tokens)

    def cross_attention(self, video: Tensor) -> Tensor:
        return video
