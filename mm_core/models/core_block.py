"""Binds the adapter to the CogVideoX blocks of the core of ComfyUI, by the names in it; nothing of it is imported.

The same mathematics as in the block of diffusers runs, `adapted_block`. ComfyUI puts `adapted_forward` in front of the
own forward of a block, as an object patch, so that LoRA, casting and offloading see the model that they know, and a
bypass removes it again.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import AttentionKernel
from .block import AdapterBlock, BaseBlock, adapted_block, video_shift
from .modulation import BlockFactors

RotaryEmbedding = tuple[Tensor, Tensor]


@dataclass(kw_only=True)
class CoreFaceState:
    """The identity in one forward pass, for the last n rows of the batch; the face stream goes from block to block."""

    id_embedding: Tensor
    """(n, P), what CAN sees."""
    face: Tensor | None
    """(n, Q, D), entering the next adapted block; None without the structure branch."""
    can_scale: float
    ip_scale: float
    ablate: Callable[[BlockFactors], BlockFactors]
    """Applied to each block's factors."""


def adapted_forward(
    block: nn.Module,
    adapter_block: AdapterBlock,
    inner: Callable[..., tuple[Tensor, Tensor]],
    key: Hashable,
    attention: Callable[..., Tensor],
    turn: Callable[[Tensor, RotaryEmbedding], Tensor],
) -> Callable[..., tuple[Tensor, Tensor]]:
    """A forward for core's `CogVideoXBlock`: ours where `transformer_options[key]` is a state, else the one before.

    inner: the forward that was there. attention: core's `optimized_attention`, so that its replacements act here too.
    turn: core's `apply_rotary_emb`.
    """

    def forward(
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: RotaryEmbedding | None = None,
        transformer_options: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        options = transformer_options or {}
        state: CoreFaceState | None = options.get(key)
        if state is None:
            return inner(
                hidden_states=hidden_states,
                encoder_hidden_states=encoder_hidden_states,
                temb=temb,
                image_rotary_emb=image_rotary_emb,
                transformer_options=transformer_options,
            )

        def kernel(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return attention(
                query,
                key,
                value,
                heads=query.shape[1],
                skip_reshape=True,
                skip_output_reshape=True,
                transformer_options=options,
            )

        def rotary(x: Tensor) -> Tensor:
            if image_rotary_emb is None:
                return x
            rest = x.shape[2] - hidden_states.shape[1]
            return torch.cat([x[:, :, :rest], turn(x[:, :, rest:], image_rotary_emb)], dim=2)

        base = take_apart(block, rotary, kernel)
        rows = temb[-len(state.id_embedding) :]
        factors = state.ablate(adapter_block.factors(state.id_embedding, rows, video_shift(base, rows)))
        video, text, state.face = adapted_block(
            base,
            adapter_block,
            hidden_states,
            encoder_hidden_states,
            temb,
            state.face,
            factors,
            state.can_scale,
            state.ip_scale,
        )
        return video, text

    return forward


def take_apart(block: nn.Module, rotary: Callable[[Tensor], Tensor], kernel: AttentionKernel) -> BaseBlock:
    """Core's block as the parts that the mathematics needs."""
    return BaseBlock(
        head_dim=block.head_dim,
        modulation1=lambda temb: block.norm1.linear(F.silu(temb)),
        norm1=block.norm1.norm,
        to_q=block.q,
        to_k=block.k,
        to_v=block.v,
        norm_q=block.norm_q,
        norm_k=block.norm_k,
        to_out=block.attn_out,
        modulation2=lambda temb: block.norm2.linear(F.silu(temb)),
        norm2=block.norm2.norm,
        feed_forward=lambda tokens: block.ff_out(F.gelu(block.ff_proj(tokens), approximate="tanh")),
        rotary=rotary,
        kernel=kernel,
    )


_RENAMED = (
    ("time_embedding.linear_", "time_embedding_linear_"),
    ("transformer_blocks.", "blocks."),
    (".attn1.to_out.0.", ".attn_out."),
    (".attn1.to_", "."),
    (".attn1.", "."),
    (".ff.net.0.proj.", ".ff_proj."),
    (".ff.net.2.", ".ff_out."),
)


def core_key(key: str) -> str:
    """The name that core has for a tensor of diffusers' transformer."""
    for theirs, cores in _RENAMED:
        key = key.replace(theirs, cores)
    return key
