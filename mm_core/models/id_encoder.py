"""The frozen half of the facial feature extractor: PhotoMaker-V2's ViT and ID perceiver (paper Sec. 3.2).

The module tree is that of the published `photomaker-v2.bin`, so that its weights load strictly
(`checkpoints/photomaker.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from ..limits import SIZES
from .config import wrong_sizes
from .id_fusion import MLP
from .perceiver import IDPerceiver

# CLIP's own normalisation of RGB in 0..1.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, kw_only=True)
class IDEncoderConfig:
    """The sizes of the ID encoder; those of the published one are in PHOTOMAKER_V2."""

    clip_hidden_size: int
    clip_intermediate_size: int
    clip_num_heads: int
    clip_num_layers: int
    clip_patch_size: int
    clip_image_size: int
    clip_projection_dim: int
    second_projection_dim: int
    id_embedding_dim: int
    """Size of the face recogniser's embedding."""
    id_token_dim: int
    num_id_tokens: int
    perceiver_depth: int
    perceiver_dim_head: int

    def __post_init__(self) -> None:
        bad = wrong_sizes(self, _LIMITS)
        if not bad and self.clip_hidden_size % self.clip_num_heads:
            bad.append(f"clip_hidden_size={self.clip_hidden_size} (not a multiple of {self.clip_num_heads} heads)")
        if not bad and (self.clip_image_size // self.clip_patch_size) ** 2 > SIZES["tokens"]:
            bad.append(f"clip_patch_size={self.clip_patch_size} (more than {SIZES['tokens']} patches)")
        if bad:
            raise ValueError("Not an ID encoder's config: " + "; ".join(bad))


# Each field's limit in SIZES.
_LIMITS = dict(
    clip_hidden_size="embed_dim",
    clip_intermediate_size="feed_forward",
    clip_num_heads="num_attention_heads",
    clip_num_layers="num_layers",
    clip_patch_size="pixel_side",
    clip_image_size="pixel_side",
    clip_projection_dim="embed_dim",
    second_projection_dim="embed_dim",
    id_embedding_dim="embed_dim",
    id_token_dim="embed_dim",
    num_id_tokens="depth",
    perceiver_depth="depth",
    perceiver_dim_head="attention_head_dim",
)


PHOTOMAKER_V2 = IDEncoderConfig(
    clip_hidden_size=1024,
    clip_intermediate_size=4096,
    clip_num_heads=16,
    clip_num_layers=24,
    clip_patch_size=14,
    clip_image_size=224,
    clip_projection_dim=768,
    second_projection_dim=1280,
    id_embedding_dim=512,
    id_token_dim=2048,
    num_id_tokens=2,
    perceiver_depth=4,
    perceiver_dim_head=128,
)


class FaceFeatures(NamedTuple):
    """What the frozen encoder sees in R photos of one person."""

    id_tokens: Tensor
    """(R, N, c), one `x_id` per photo."""
    structure_tokens: Tensor
    """(R, S, clip_hidden_size), the ViT's penultimate hidden state."""


class FuseModule(nn.Module):
    """PhotoMaker's own text fusion, into SDXL's text; for CogVideoX's there is `id_fusion`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp1 = MLP(2 * dim, dim)
        self.mlp2 = MLP(dim, dim)
        self.layer_norm = nn.LayerNorm(dim)

    def forward(self, text_slots: Tensor, id_tokens: Tensor) -> Tensor:
        """(K, c) embeddings of the person's word and (K, c) ID tokens -> (K, c) fused slots."""
        fused = text_slots + self.mlp1(torch.cat([text_slots, id_tokens], dim=-1))
        return self.layer_norm(fused + self.mlp2(fused))


class IDEncoder(CLIPVisionModelWithProjection):
    """`vision_model` (ViT) + `qformer_perceiver` (tau_id); `fuse_module` is for SDXL, the projections for the file's
    sake."""

    def __init__(self, config: IDEncoderConfig) -> None:
        vision = CLIPVisionConfig(
            hidden_size=config.clip_hidden_size,
            intermediate_size=config.clip_intermediate_size,
            num_attention_heads=config.clip_num_heads,
            num_hidden_layers=config.clip_num_layers,
            patch_size=config.clip_patch_size,
            image_size=config.clip_image_size,
            projection_dim=config.clip_projection_dim,
        )
        super().__init__(vision)
        self.visual_projection_2 = nn.Linear(config.clip_hidden_size, config.second_projection_dim, bias=False)
        self.fuse_module = FuseModule(config.id_token_dim)
        self.qformer_perceiver = IDPerceiver(
            id_dim=config.id_embedding_dim,
            image_dim=config.clip_hidden_size,
            dim=config.id_token_dim,
            num_tokens=config.num_id_tokens,
            depth=config.perceiver_depth,
            dim_head=config.perceiver_dim_head,
        )

    def forward(self, pixels: Tensor, id_embeddings: Tensor) -> FaceFeatures:
        """Encode R photos of one person.

        Args:
            pixels: (R, 3, 224, 224), RGB in 0..1, not yet normalised.
            id_embeddings: (R, 512), raw ArcFace embeddings (not divided by their norm).
        """
        mean = pixels.new_tensor(CLIP_MEAN).view(3, 1, 1)
        std = pixels.new_tensor(CLIP_STD).view(3, 1, 1)
        pixels = ((pixels - mean) / std).to(self.dtype)
        hidden_states = self.vision_model(pixels, output_hidden_states=True).hidden_states
        id_tokens = self.qformer_perceiver(id_embeddings.to(self.dtype), hidden_states[-1])
        return FaceFeatures(id_tokens=id_tokens, structure_tokens=hidden_states[-2])
