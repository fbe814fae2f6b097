"""The Magic Mirror adapter: everything that training produces, nothing of the base model."""

from __future__ import annotations

from torch import Tensor, nn

from .block import VIDEO_AND_TEXT, AdapterBlock
from .config import AdapterConfig
from .id_encoder import FaceFeatures
from .id_fusion import IDFusion
from .perceiver import FacePerceiver


class MagicMirrorAdapter(nn.Module):
    """Face perceiver, projections, text fusion, and one `AdapterBlock` for each adapted DiT block.

    Its state dict is the adapter checkpoint, key by key (docs/checkpoint.md).

    Args:
        streams: those whose modulation CAN changes, a matter of the base's family (`Host.streams`).
    """

    def __init__(self, config: AdapterConfig, streams: tuple[str, ...] = VIDEO_AND_TEXT) -> None:
        super().__init__()
        self.config = config
        self.face_perceiver = FacePerceiver(
            image_dim=config.clip_hidden_size,
            dim=config.perceiver_dim,
            num_tokens=config.num_face_tokens,
            depth=config.perceiver_depth,
            dim_head=config.perceiver_dim_head,
        )
        self.face_proj = nn.Linear(config.perceiver_dim, config.hidden_size)
        self.id_fusion = IDFusion(config.text_embed_dim, config.id_token_dim)
        self.id_proj = nn.Linear(config.num_id_tokens * config.id_token_dim, config.id_proj_dim)
        self.blocks = nn.ModuleDict({str(layer): AdapterBlock(config, streams) for layer in config.adapted_layers})
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """A fresh adapter starts as close to the base model as a face stream allows."""
        zero = []
        # Modulation predictors end in zero [paper]: no residual on the base's factors, and a face stream whose gates
        # are closed, so that it enters every block as the perceiver made it.
        for block in self.blocks.values():
            zero += [block.face_modulation.linear_2, block.can.linear_2]
            # The cross-attention adds nothing at first.
            zero.append(block.attn.to_v_ip)
        # The fused word is the word itself at first.
        zero += [self.id_fusion.mlp1.fc2, self.id_fusion.mlp2.fc2]
        for layer in zero:
            nn.init.zeros_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def face_tokens(self, features: FaceFeatures, weights: Tensor | None = None) -> Tensor:
        """`x_face` (Eq. 4) of R photos of one person, projected to the DiT's width: (1, Q, D).

        weights: (R,) above 0, as if each photo were given so many times.
        """
        tokens = features.structure_tokens.flatten(0, 1)[None]  # (R, S, clip) -> (1, R * S, clip)
        if weights is not None:
            weights = weights.repeat_interleave(features.structure_tokens.shape[1])  # (R * S,)
        return self.face_proj(self.face_perceiver(tokens, weights))

    def id_embedding(self, id_tokens: Tensor) -> Tensor:
        """The identity as CAN sees it: (B, N, c) ID tokens, flattened token after token -> (B, c1)."""
        return self.id_proj(id_tokens.flatten(1))
