"""Binds the adapter to diffusers' CogVideoX blocks: the only file of the models that knows them.

`attach` puts a forward of ours in front of each block's own. It acts only while the caller passes a `FaceState` in the
transformer's `attention_kwargs`; without one the block runs its own code, bit for bit. No weight of the base is touched
and no module is added to it, so LoRA, offloading, casting and state dicts see the model they know.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import CogVideoXTransformer3DModel
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock
from torch import Tensor

from .adapter import MagicMirrorAdapter
from .block import AdapterBlock, BaseBlock, adapted_block, video_shift
from .modulation import BlockFactors

STATE = "magic_mirror"
"""The key of a `FaceState` in `attention_kwargs`."""

RotaryEmbedding = tuple[Tensor, Tensor]


@dataclass(kw_only=True)
class FaceState:
    """The identity in one forward pass of the transformer.

    The last n rows of the batch carry it. The face stream travels here from one adapted block to the next, kept by the
    number of the block it enters, so that gradient checkpointing finds each block's own input when it runs it again.
    """

    factors: dict[int, BlockFactors]
    """The adapter's modulation of each adapted block at this timestep."""
    streams: dict[int, Tensor | None]
    """The face stream entering each block, (n, Q, D), written by the adapted block before it; the first block's is
    there from the start. None: no structure branch."""
    can_scale: float = 1.0
    ip_scale: float = 1.0
    order: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.order = tuple(self.factors)


def attach(transformer: CogVideoXTransformer3DModel, adapter: MagicMirrorAdapter) -> None:
    """Put the adapter on a transformer. Do it before offloading or caching: their hooks must wrap ours.

    Raises:
        ValueError: another adapter is attached, the sizes differ, or the blocks are wrapped by hooks already.
    """
    check_fits(transformer, adapter)
    # Not `"forward" in vars(block)`: hooks that were switched off leave the block's own method there.
    blocks = enumerate(transformer.transformer_blocks)
    wrapped = [i for i, block in blocks if getattr(block.forward, "__func__", None) is not type(block).forward]
    if wrapped:
        raise ValueError(
            f"Blocks {wrapped} of the transformer have a replaced forward (an adapter, or the hooks of offloading or "
            "caching). Detach the adapter, or switch those off, attach, and switch them on again."
        )
    for layer, block in enumerate(transformer.transformer_blocks):
        adapter_block = adapter.blocks[str(layer)] if layer in adapter.config.adapted_layers else None
        block.forward = functools.partial(_forward, block, adapter_block, layer)
        block.carries_identity = adapter_block is not None  # hooks may hide our forward, not this


def detach(transformer: CogVideoXTransformer3DModel) -> None:
    """Take the adapter off; a transformer without one is left as it is.

    Raises:
        ValueError: hooks of offloading or caching wrap the blocks; switch them off first.
    """
    blocks = [block for block in transformer.transformer_blocks if is_attached(block)]
    if any(getattr(block.forward, "func", None) is not _forward for block in blocks):
        raise ValueError("Hooks wrap the adapted blocks: switch offloading and caching off before detaching.")
    for block in blocks:
        del block.forward, block.carries_identity


def is_attached(block: CogVideoXBlock) -> bool:
    """Whether our forward runs in this block, however many hooks wrap it."""
    return hasattr(block, "carries_identity")


def check_fits(transformer: CogVideoXTransformer3DModel, adapter: MagicMirrorAdapter) -> None:
    """Raise ValueError, naming every size that differs, when the adapter was made for another base."""
    misfits = adapter.config.misfits(transformer.config)
    if misfits:
        raise ValueError(f"The adapter was made for another base model: {misfits}.")


def _forward(
    block: CogVideoXBlock,
    adapter_block: AdapterBlock | None,
    layer: int,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: RotaryEmbedding | None = None,
    attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """`CogVideoXBlock.forward`, with the identity when there is one and this block is adapted."""
    rest = dict(attention_kwargs or {})
    state: FaceState | None = rest.pop(STATE, None)
    if state is None or adapter_block is None:
        return type(block).forward(block, hidden_states, encoder_hidden_states, temb, image_rotary_emb, rest)
    video, text, face = adapted_block(
        take_apart(block, hidden_states.shape[1], image_rotary_emb),
        adapter_block,
        hidden_states,
        encoder_hidden_states,
        temb,
        state.streams[layer],
        state.factors[layer],
        state.can_scale,
        state.ip_scale,
    )
    position = state.order.index(layer) + 1
    if position < len(state.order):
        state.streams[state.order[position]] = face
    return video, text


def take_apart(
    block: CogVideoXBlock, video_length: int = 0, image_rotary_emb: RotaryEmbedding | None = None
) -> BaseBlock:
    """diffusers' block as the parts that the mathematics needs."""
    attn = block.attn1

    def rotary(x: Tensor) -> Tensor:
        if image_rotary_emb is None:
            return x
        rest = x.shape[2] - video_length
        return torch.cat([x[:, :, :rest], apply_rotary_emb(x[:, :, rest:], image_rotary_emb)], dim=2)

    def kernel(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        backend = getattr(attn.processor, "_attention_backend", None)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        return dispatch_attention_fn(query, key, value, backend=backend).transpose(1, 2)

    return BaseBlock(
        head_dim=attn.inner_dim // attn.heads,
        modulation1=lambda temb: block.norm1.linear(F.silu(temb)),
        norm1=block.norm1.norm,
        to_q=attn.to_q,
        to_k=attn.to_k,
        to_v=attn.to_v,
        norm_q=attn.norm_q if attn.norm_q is not None else _identity,
        norm_k=attn.norm_k if attn.norm_k is not None else _identity,
        to_out=lambda tokens: attn.to_out[1](attn.to_out[0](tokens)),
        modulation2=lambda temb: block.norm2.linear(F.silu(temb)),
        norm2=block.norm2.norm,
        feed_forward=block.ff,
        rotary=rotary,
        kernel=kernel,
    )


def _identity(x: Tensor) -> Tensor:
    return x


def face_state(
    transformer: CogVideoXTransformer3DModel,
    adapter: MagicMirrorAdapter,
    *,
    id_tokens: Tensor,
    face_tokens: Tensor | None,
    timestep: Tensor,
    can_scale: float = 1.0,
    ip_scale: float = 1.0,
) -> FaceState:
    """The identity of a single forward pass, its factors computed here and now, with gradients.

    A sampler with a known schedule computes them once for all steps instead (`pipelines/conditioning.py`).

    Args:
        id_tokens: (n, N, c) `x_id`, for the last n rows of the batch.
        face_tokens: (n, Q, D) from `MagicMirrorAdapter.face_tokens`; None for no structure branch.
        timestep: (n,).
    """
    temb = time_embedding(transformer, timestep, id_tokens.dtype)
    id_embedding = adapter.id_embedding(id_tokens)
    factors = {}
    for layer in adapter.config.adapted_layers:
        shift = video_shift(take_apart(transformer.transformer_blocks[layer]), temb)
        factors[layer] = adapter.blocks[str(layer)].factors(id_embedding, temb, shift)
    return FaceState(
        factors=factors, streams=dict.fromkeys(factors, face_tokens), can_scale=can_scale, ip_scale=ip_scale
    )


def time_embedding(transformer: CogVideoXTransformer3DModel, timesteps: Tensor, dtype: torch.dtype) -> Tensor:
    """The base's `temb` for a batch of timesteps: (n,) -> (n, Dt)."""
    return transformer.time_embedding(transformer.time_proj(timesteps).to(dtype))
