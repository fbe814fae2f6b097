"""Real classes at sizes that run in milliseconds. Neighbouring sizes differ, so that a mixed-up axis cannot pass."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel
from torch import Tensor, nn

from mm_core.models.adapter import MagicMirrorAdapter
from mm_core.models.config import AdapterConfig
from mm_core.models.diffusers_block import FaceState, take_apart, time_embedding
from mm_core.models.block import video_shift

TEXT_TOKENS = 7
FRAMES, HEIGHT, WIDTH = 4, 4, 6
"""Of the latents; 4 frames are two patches of CogVideoX 1.5."""

_TRANSFORMER = dict(
    num_attention_heads=2,
    attention_head_dim=16,
    num_layers=5,
    time_embed_dim=10,
    text_embed_dim=14,
    in_channels=4,
    out_channels=4,
    max_text_seq_length=TEXT_TOKENS,
    sample_frames=13,
    sample_height=HEIGHT,
    sample_width=WIDTH,
)
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "5b": _TRANSFORMER | dict(use_rotary_positional_embeddings=True),
    "2b": _TRANSFORMER | dict(use_rotary_positional_embeddings=False),
    "1.5": _TRANSFORMER | dict(use_rotary_positional_embeddings=True, patch_size_t=2, patch_bias=False),
}
"""The three published kinds: rotary positions, a sine table, rotary positions and patches in time."""

ADAPTER_SIZES = dict(
    id_token_dim=12,
    id_proj_dim=9,
    can_hidden_dim=11,
    clip_hidden_size=6,
    perceiver_dim=8,
    perceiver_depth=2,
    perceiver_dim_head=4,
    num_face_tokens=3,
)


@torch.no_grad()
def fill_with_noise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter, zero-initialised ones too, noise that keeps activations near unit size."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * fan_in**-0.5)
    return module.eval()


def build_transformer(kind: str) -> CogVideoXTransformer3DModel:
    return fill_with_noise(CogVideoXTransformer3DModel(**TRANSFORMERS[kind])).requires_grad_(False)


def build_adapter(transformer: CogVideoXTransformer3DModel, **sizes: Any) -> MagicMirrorAdapter:
    return fill_with_noise(MagicMirrorAdapter(AdapterConfig.for_base(transformer.config, **(ADAPTER_SIZES | sizes))), 1)


def noise(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rotary_embedding(tokens: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """(cos, sin), (tokens, head_dim) each, of arbitrary angles, one for each pair of channels."""
    angles = noise(tokens, head_dim // 2, seed=3).repeat_interleave(2, dim=-1)
    return angles.cos(), angles.sin()


def transformer_inputs(transformer: CogVideoXTransformer3DModel, batch: int = 1) -> dict[str, Any]:
    """Arguments of a forward pass; all rows differ."""
    config = transformer.config
    tokens = FRAMES // (config.patch_size_t or 1) * (HEIGHT // 2) * (WIDTH // 2)
    rotary = rotary_embedding(tokens, config.attention_head_dim) if config.use_rotary_positional_embeddings else None
    return dict(
        hidden_states=noise(batch, FRAMES, config.in_channels, HEIGHT, WIDTH, seed=4),
        encoder_hidden_states=noise(batch, TEXT_TOKENS, config.text_embed_dim, seed=5),
        timestep=torch.full((batch,), 500),
        image_rotary_emb=rotary,
    )


def build_face_state(
    transformer: CogVideoXTransformer3DModel,
    adapter: MagicMirrorAdapter,
    *,
    id_tokens: Tensor,
    face_tokens: Tensor | None,
    timestep: Tensor,
    can_scale: float = 1.0,
    ip_scale: float = 1.0,
) -> FaceState:
    """The identity of one forward pass, its factors computed here and now."""
    rows = id_tokens.shape[0]
    temb = time_embedding(transformer, timestep[:rows], id_tokens.dtype)
    id_embedding = adapter.id_embedding(id_tokens)
    factors = {}
    for layer in adapter.config.adapted_layers:
        shift = video_shift(take_apart(transformer.transformer_blocks[layer]), temb)
        factors[layer] = adapter.blocks[str(layer)].factors(id_embedding, temb, shift)
    return FaceState(
        factors=factors, streams=dict.fromkeys(factors, face_tokens), can_scale=can_scale, ip_scale=ip_scale
    )


def assert_near(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """The largest difference, relative to the largest value."""
    assert actual.shape == expected.shape
    difference = (actual - expected).abs().max() / expected.abs().max()
    assert difference <= tolerance, f"differs by {difference:.2e} of the largest value, allowed {tolerance:.0e}"
