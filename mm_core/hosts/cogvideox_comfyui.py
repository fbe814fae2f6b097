"""CogVideoX in ComfyUI's core, by the names in it; nothing of it is imported.

`nodes/native_model.py` puts `adapted_forward` in front of a block's own forward, as an object patch, so that LoRA,
casting and offloading see the model that they know, and a bypass removes it again.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.attention import apply_rotary_emb, split_heads
from ..models.block import AdapterBlock, FaceState, run_block
from ..models.config import base_sizes
from .cogvideox import CogVideoXModulation
from .host import Host

RotaryEmbedding = tuple[Tensor, Tensor]


class ComfyCogVideoX(Host):
    """`comfy.ldm.cogvideo.model.CogVideoXTransformer3DModel`.

    Args:
        attention: core's `optimized_attention`, so that its replacements act here too.
        timestep_embedding: core's `get_timestep_embedding`.
    """

    def __init__(self, *, attention: Callable[..., Tensor], timestep_embedding: Callable[..., Tensor]) -> None:
        self.attention, self.timestep_embedding = attention, timestep_embedding

    def sizes(self, transformer: nn.Module) -> dict[str, int]:
        blocks = transformer.blocks
        return base_sizes(
            dict(
                num_attention_heads=transformer.num_attention_heads,
                attention_head_dim=transformer.attention_head_dim,
                num_layers=len(blocks),
                time_embed_dim=blocks[0].norm1.linear.in_features,
                text_embed_dim=transformer.patch_embed.text_proj.in_features,
            )
        )

    def blocks(self, transformer: nn.Module) -> Sequence[nn.Module]:
        return transformer.blocks

    def parts(self, block: nn.Module) -> ComfyParts:
        return ComfyParts(self, block, None, {})

    def time_embedding(self, transformer: nn.Module, timesteps: Tensor, dtype: torch.dtype) -> Tensor:
        net = transformer
        wave = self.timestep_embedding(timesteps, net.time_proj_dim, net.time_proj_flip, net.time_proj_shift).to(dtype)
        return net.time_embedding_linear_2(net.time_embedding_act(net.time_embedding_linear_1(wave)))

    def adapted_forward(
        self,
        block: nn.Module,
        adapter_block: AdapterBlock,
        place: Place,
        inner: Callable[..., tuple[Tensor, Tensor]],
        key: Hashable,
    ) -> Callable[..., tuple[Tensor, Tensor]]:
        """A forward for a block: ours where `transformer_options[key]` is a `FaceState`, else the one before.

        inner: the forward that was there.
        """
        def forward(
            hidden_states: Tensor,
            encoder_hidden_states: Tensor,
            temb: Tensor,
            image_rotary_emb: RotaryEmbedding | None = None,
            transformer_options: dict[str, Any] | None = None,
        ) -> tuple[Tensor, Tensor]:
            options = transformer_options or {}
            state: FaceState | None = options.get(key)

            def plain(video: Tensor, text: Tensor, temb: Tensor) -> tuple[Tensor, Tensor]:
                return inner(
                    hidden_states=video,
                    encoder_hidden_states=text,
                    temb=temb,
                    image_rotary_emb=image_rotary_emb,
                    transformer_options=transformer_options,
                )

            if state is None:
                return plain(hidden_states, encoder_hidden_states, temb)
            parts = ComfyParts(self, block, image_rotary_emb, options)
            return run_block(
                parts, adapter_block, place.position, state, plain, hidden_states, encoder_hidden_states, temb
            )

        return forward


@dataclass(eq=False)
class Place:
    """Which of the adapted blocks one is. A tensor says it: to `torch.compile` all blocks are the same."""

    position: Tensor | None = None
    """(1,), on the device; during a step only."""


class ComfyParts(CogVideoXModulation):
    """Core's block as the parts that the mathematics needs; see `BlockParts`."""

    def __init__(
        self, host: ComfyCogVideoX, block: nn.Module, image_rotary_emb: RotaryEmbedding | None, options: dict[str, Any]
    ) -> None:
        super().__init__(block)
        self.host, self.image_rotary_emb, self.options = host, image_rotary_emb, options

    def qkv(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        block = self.block
        q, k, v = (split_heads(layer(tokens), block.head_dim) for layer in (block.q, block.k, block.v))
        return block.norm_q(q), block.norm_k(k), v

    def apply_rotary_emb(self, x: Tensor) -> Tensor:
        return x if self.image_rotary_emb is None else apply_rotary_emb(x, self.image_rotary_emb)

    def attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.host.attention(
            query,
            key,
            value,
            heads=query.shape[1],
            skip_reshape=True,
            skip_output_reshape=True,
            transformer_options=self.options,
        )

    def to_out(self, tokens: Tensor) -> Tensor:
        return self.block.attn_out(tokens)

    def feed_forward(self, tokens: Tensor) -> Tensor:
        return self.block.ff_out(F.gelu(self.block.ff_proj(tokens), approximate="tanh"))
