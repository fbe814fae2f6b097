"""What a pair of model family and host brings, so that the adapter's mathematics runs in its blocks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..models.adapter import MagicMirrorAdapter
from ..models.block import VIDEO_AND_TEXT, AdapterBlock, BlockParts, FaceState
from ..models.modulation import BlockFactors


class Host(ABC):
    """One family of base models (CogVideoX) in one library (diffusers, ComfyUI's core)."""

    streams: ClassVar[tuple[str, ...]] = VIDEO_AND_TEXT
    """The streams whose modulation CAN changes, video first; each has 6 x D factors."""

    @abstractmethod
    def sizes(self, transformer: nn.Module) -> dict[str, int]:
        """What an adapter's config must agree with, under the names of `AdapterConfig`."""

    @abstractmethod
    def blocks(self, transformer: nn.Module) -> Sequence[nn.Module]:
        """The DiT blocks, in order."""

    @abstractmethod
    def parts(self, block: nn.Module) -> BlockParts:
        """A block as its parts, without rotary positions: for what does not depend on the latents."""

    @abstractmethod
    def time_embedding(self, transformer: nn.Module, timesteps: Tensor, dtype: torch.dtype) -> Tensor:
        """The base's `temb` for a batch of timesteps: (n,) -> (n, Dt)."""

    def factors(
        self, transformer: nn.Module, adapter: MagicMirrorAdapter, id_embedding: Tensor, temb: Tensor
    ) -> BlockFactors:
        """The adapter's modulation of its A blocks for n rows, with gradients: face (A, n, 6, D), can (A, n, .., D).

        Args:
            id_embedding: (n, c1) from `MagicMirrorAdapter.id_embedding`.
            temb: (n, Dt).
        """
        blocks = self.blocks(transformer)
        found = [
            adapter.blocks[str(layer)].factors(id_embedding, temb, self.parts(blocks[layer]).video_shift(temb))
            for layer in adapter.config.adapted_layers
        ]
        return BlockFactors(*map(torch.stack, zip(*found)))

    def packed_factors(
        self, adapter_block: AdapterBlock, block: nn.Module, id_embedding: Tensor, tembs: Sequence[Tensor]
    ) -> Tensor:
        """The same of one block, for a person at many timesteps: (timesteps, 6 + 6 * streams, D).

        Row by row, with the bits of a timestep on its own: a matrix product of many rows gives each other ones.

        Args:
            block: the base's.
            id_embedding: (1, c1).
            tembs: (1, Dt) each.
        """
        base = self.parts(block)
        rows = [adapter_block.factors(id_embedding, temb, base.video_shift(temb)).packed() for temb in tembs]
        return torch.cat(rows)

    def face_state(
        self,
        transformer: nn.Module,
        adapter: MagicMirrorAdapter,
        *,
        id_embedding: Tensor,
        face_tokens: Tensor | None,
        timestep: Tensor,
        can_scale: float = 1.0,
        ip_scale: float = 1.0,
    ) -> FaceState:
        """The identity of a single forward pass, its factors computed here and now, with gradients.

        A sampler with a known schedule computes them once for all steps instead (`pipelines/conditioning.py`).

        Args:
            id_embedding: (n, c1) from `MagicMirrorAdapter.id_embedding`, for the last n rows of the batch.
            face_tokens: (n, Q, D) from `MagicMirrorAdapter.face_tokens`; None for no structure branch.
            timestep: (n,).
        """
        temb = self.time_embedding(transformer, timestep, id_embedding.dtype)
        factors = self.factors(transformer, adapter, id_embedding, temb)
        factors = factors._replace(can=can_scale * factors.can)
        return FaceState.entering(face_tokens, factors, id_embedding.new_full((), ip_scale))
