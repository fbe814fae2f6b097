"""Real classes at sizes that run in milliseconds. Neighbouring sizes differ, so that a mixed-up axis cannot pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel

from mm_core.checkpoints.adapter_file import Trained, save_adapter
from mm_core.models.adapter import MagicMirrorAdapter
from mm_core.models.config import AdapterConfig
from mm_core.models.id_encoder import FaceFeatures
from mm_core.pipelines.identity import Identity
from mm_core.pipelines.presets import SCHEDULER
from mm_core.pipelines.tiny import build_tokenizer

# At these sizes threads only wait for each other.
torch.set_num_threads(1)

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
    sample_frames=17,
    sample_height=HEIGHT,
    sample_width=WIDTH,
)
TINY_KINDS = ("5b", "2b", "1.5")
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

VAE = dict(
    block_out_channels=(8, 8, 8, 8),
    down_block_types=("CogVideoXDownBlock3D",) * 4,
    up_block_types=("CogVideoXUpBlock3D",) * 4,
    latent_channels=4,
    layers_per_block=1,
    norm_num_groups=4,
    sample_height=128,
    sample_width=128,
    scaling_factor=0.7,
)
_T5 = dict(d_model=14, d_kv=4, d_ff=20, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu")
PROMPT_TOKENS = 24


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


def build_pipeline(kind: str) -> CogVideoXPipeline:
    """A base model whose prompts have `PROMPT_TOKENS` tokens."""
    tokenizer = build_tokenizer()
    transformer = CogVideoXTransformer3DModel(**TRANSFORMERS[kind] | dict(max_text_seq_length=PROMPT_TOKENS))
    return CogVideoXPipeline(
        tokenizer=tokenizer,
        text_encoder=fill_with_noise(
            T5EncoderModel(T5Config(vocab_size=len(tokenizer), tie_word_embeddings=False, **_T5))
        ),
        vae=AutoencoderKLCogVideoX(**VAE).eval(),
        transformer=fill_with_noise(transformer),
        scheduler=CogVideoXDDIMScheduler(**SCHEDULER),
    )


def save_tiny_folder(kind: str, folder: Path) -> Path:
    """Such a model in diffusers' layout, and an adapter for it."""
    pipe = build_pipeline(kind)
    pipe.save_pretrained(folder)
    trained = Trained(stage="untrained", steps=0, data="seeded noise")
    save_adapter(build_adapter(pipe.transformer), folder / "adapter.safetensors", base_model=kind, trained=trained)
    return folder


def build_identity(seed: int = 0, references: int = 1) -> Identity:
    """Somebody, as the frozen encoder would see several photos of them."""
    id_tokens = noise(references, 2, ADAPTER_SIZES["id_token_dim"], seed=seed)
    structure_tokens = noise(references, 5, ADAPTER_SIZES["clip_hidden_size"], seed=seed + 1)
    return Identity(features=FaceFeatures(id_tokens=id_tokens, structure_tokens=structure_tokens), references=())


def assert_near(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """The largest difference, relative to the largest value."""
    assert actual.shape == expected.shape
    difference = (actual - expected).abs().max() / expected.abs().max()
    assert difference <= tolerance, f"differs by {difference:.2e} of the largest value, allowed {tolerance:.0e}"
