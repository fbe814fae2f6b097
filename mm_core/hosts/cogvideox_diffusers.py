"""CogVideoX in diffusers: the only file outside the pipelines that knows diffusers' blocks.

`attach` puts a forward of ours in front of each adapted block's own. It acts only while the caller passes a `FaceState`
in the transformer's `attention_kwargs`; without one the block runs its own code, bit for bit. No weight of the base is
touched and no module is added to it, so LoRA, offloading, casting and state dicts see the model they know.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock
from torch import Tensor

from ..models.adapter import MagicMirrorAdapter
from ..models.attention import apply_rotary_emb, join_heads, split_heads
from ..models.block import AdapterBlock, FaceState, run_block, turned
from ..models.config import base_sizes
from .cogvideox import CogVideoXModulation
from .host import Host

# The key of a `FaceState` in `attention_kwargs`: one that diffusers' attention passes over without a warning, in the
# blocks that are not adapted.
STATE = "ip_hidden_states"

RotaryEmbedding = tuple[Tensor, Tensor]


class DiffusersCogVideoX(Host):
    """`CogVideoXTransformer3DModel` of diffusers."""

    def sizes(self, transformer: CogVideoXTransformer3DModel) -> dict[str, int]:
        return base_sizes(transformer.config)

    def blocks(self, transformer: CogVideoXTransformer3DModel) -> Sequence[CogVideoXBlock]:
        return transformer.transformer_blocks

    def parts(self, block: CogVideoXBlock) -> CogVideoXParts:
        return CogVideoXParts(block, None)

    def time_embedding(self, transformer: CogVideoXTransformer3DModel, timesteps: Tensor, dtype: torch.dtype) -> Tensor:
        return transformer.time_embedding(transformer.time_proj(timesteps).to(dtype))


HOST = DiffusersCogVideoX()


class _AttentionParts:
    """diffusers' attention in its steps."""

    def __init__(self, attn: Attention, image_rotary_emb: RotaryEmbedding | None) -> None:
        self.attn, self.image_rotary_emb = attn, image_rotary_emb

    def qkv(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        attn = self.attn
        if attn.fused_projections:
            projected = attn.to_qkv(tokens).chunk(3, dim=-1)
        else:
            projected = attn.to_q(tokens), attn.to_k(tokens), attn.to_v(tokens)
        q, k, v = (split_heads(x, attn.inner_dim // attn.heads) for x in projected)
        if attn.norm_q is not None:
            q, k = attn.norm_q(q), attn.norm_k(k)
        return q, k, v

    def apply_rotary_emb(self, x: Tensor) -> Tensor:
        return x if self.image_rotary_emb is None else apply_rotary_emb(x, self.image_rotary_emb)

    def attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        processor = self.attn.processor
        options = {"backend": getattr(processor, "_attention_backend", None)}
        if getattr(processor, "_parallel_config", None) is not None:
            options["parallel_config"] = processor._parallel_config
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        return dispatch_attention_fn(query, key, value, **options).transpose(1, 2)

    def to_out(self, tokens: Tensor) -> Tensor:
        linear, dropout = self.attn.to_out
        return dropout(linear(tokens))


class CogVideoXParts(_AttentionParts, CogVideoXModulation):
    """diffusers' block as the parts that the mathematics needs; see `BlockParts`."""

    def __init__(self, block: CogVideoXBlock, image_rotary_emb: RotaryEmbedding | None) -> None:
        _AttentionParts.__init__(self, block.attn1, image_rotary_emb)
        self.block = block

    def feed_forward(self, tokens: Tensor) -> Tensor:
        return self.block.ff(tokens)


class DispatchingAttention:
    """What `CogVideoXAttnProcessor2_0` computes, by a kernel of diffusers' dispatcher, which that one does not ask."""

    def __init__(self, backend: AttentionBackendName | None = None) -> None:
        # By the names that diffusers' models set and read.
        self._attention_backend, self._parallel_config = backend, None

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: RotaryEmbedding | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Video (B, S, D) and text (B, T, D) after the joint attention. attention_mask: CogVideoX has none."""
        parts, streams = _AttentionParts(attn, image_rotary_emb), [encoder_hidden_states, hidden_states]
        lengths = [stream.shape[1] for stream in streams]
        q, k, v = parts.qkv(torch.cat(streams, dim=1))
        q, k = (turned(parts, x, lengths) for x in (q, k))
        text, video = parts.to_out(join_heads(parts.attention(q, k, v))).split(lengths, dim=1)
        return video, text


# By names of this module: `torch.compile` does not follow `type(block).forward`, nor `CogVideoXBlock.forward`.
_own_forward = CogVideoXBlock.forward
_own_attention = Attention.forward


class _WithoutCaches:
    """A block for its own forward, its attention without the hooks of caches: they count on whole batches."""

    def __init__(self, block: CogVideoXBlock) -> None:
        self.norm1, self.norm2, self.ff, self._attention = block.norm1, block.norm2, block.ff, block.attn1

    def attn1(self, **inputs: Any) -> tuple[Tensor, Tensor]:
        return _own_attention(self._attention, **inputs)


class _AdaptedForward:
    """Stands in front of a block's own forward."""

    def __init__(self, block: CogVideoXBlock, adapter_block: AdapterBlock, position: int) -> None:
        self.block = block
        self.adapter_block: AdapterBlock | None = adapter_block
        self.position = torch.tensor([position], device="cpu")
        """(1,), which of the adapted blocks this is."""

    def __call__(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: RotaryEmbedding | None = None,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`CogVideoXBlock.forward`, with the identity where there is one."""
        state: FaceState | None = (attention_kwargs or {}).get(STATE)

        if state is None or self.adapter_block is None:
            return _own_forward(
                self.block, hidden_states, encoder_hidden_states, temb, image_rotary_emb, attention_kwargs
            )

        def plain(video: Tensor, text: Tensor, temb: Tensor) -> tuple[Tensor, Tensor]:
            return _own_forward(_WithoutCaches(self.block), video, text, temb, image_rotary_emb)

        return run_block(
            CogVideoXParts(self.block, image_rotary_emb),
            self.adapter_block,
            self.position,
            state,
            plain,
            hidden_states,
            encoder_hidden_states,
            temb,
        )


class Attached:
    """An adapter on a transformer, until `remove()` or the end of a `with` block."""

    def __init__(self, transformer: CogVideoXTransformer3DModel, adapter: MagicMirrorAdapter) -> None:
        self.transformer, self.adapter = transformer, adapter
        self.part = (0, 1)
        """Which part of the face tokens is this process's, of how many: see `pipelines/context_parallel.py`."""
        blocks = transformer.transformer_blocks
        self._forwards = [
            _AdaptedForward(blocks[layer], adapter.blocks[str(layer)], position)
            for position, layer in enumerate(adapter.config.adapted_layers)
        ]
        for forward in self._forwards:
            forward.block.forward = forward

    def ready(self, state: FaceState) -> FaceState:
        """The state, for a forward pass on the device that it is on."""
        # Moved here, not in the block: there it would be a second graph to `torch.compile`.
        self.to(state.streams.device)
        if self.part != (0, 1):
            state.streams = state.streams.tensor_split(self.part[1], dim=2)[self.part[0]]
        return state

    def to(self, device: torch.device) -> None:
        """Move the blocks' numbers, all that is here beside the modules."""
        if self._forwards[0].position.device != device:
            for forward, position in zip(self._forwards, torch.arange(len(self._forwards), device=device).split(1)):
                forward.position = position

    def face_state(
        self,
        *,
        id_tokens: Tensor,
        face_tokens: Tensor | None,
        timestep: Tensor,
        can_scale: float = 1.0,
        ip_scale: float = 1.0,
    ) -> FaceState:
        """The identity of a single forward pass, with gradients, to be passed as `attention_kwargs={STATE: state}`.

        Args:
            id_tokens: (n, N, c) `x_id`, for the last n rows of the batch.
            face_tokens: (n, Q, D) from `MagicMirrorAdapter.face_tokens`; None for no structure branch.
            timestep: (n,).
            can_scale, ip_scale: strengths of CAN's residuals and of the cross-attention.
        """
        state = HOST.face_state(
            self.transformer,
            self.adapter,
            id_embedding=self.adapter.id_embedding(id_tokens),
            face_tokens=face_tokens,
            timestep=timestep,
            can_scale=can_scale,
            ip_scale=ip_scale,
        )
        return self.ready(state)

    def remove(self) -> None:
        """Give the blocks their own forward back, also beneath hooks of offloading or caching that came later."""
        for forward in self._forwards:
            forward.adapter_block = None  # hooks may have kept it
            if vars(forward.block).get("forward") is forward:
                del forward.block.forward

    def __enter__(self) -> Attached:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def attach(transformer: CogVideoXTransformer3DModel, adapter: MagicMirrorAdapter) -> Attached:
    """Put the adapter on a transformer. Do it before offloading or caching: their hooks must wrap ours.

    Raises:
        ValueError: another adapter is attached, the sizes differ, or the blocks are wrapped by hooks already.
    """
    misfits = adapter.config.misfits(HOST.sizes(transformer))
    if misfits:
        raise ValueError(f"The adapter was made for another base model: {misfits}.")
    wrapped = [i for i, block in enumerate(transformer.transformer_blocks) if not _is_free(block)]
    if wrapped:
        raise ValueError(
            f"Blocks {wrapped} of the transformer have a replaced forward (an adapter, or the hooks of offloading or "
            "caching). Remove the adapter, or switch those off, attach, and switch them on again."
        )
    return Attached(transformer, adapter)


def _is_free(block: CogVideoXBlock) -> bool:
    """Whether a block runs its own forward, or a former one of ours that hooks had kept."""
    # Not `"forward" in vars(block)`: hooks that were switched off leave the block's own method there.
    forward = block.forward
    if isinstance(forward, _AdaptedForward):
        return forward.adapter_block is None
    return getattr(forward, "__func__", None) is _own_forward
