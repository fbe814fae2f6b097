"""The adapter's architecture: a dataclass that is saved in the header of every adapter file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import short
from ..limits import SIZES

# Each field's limit in SIZES.
_LIMITS = dict(
    hidden_size="hidden_size",
    num_attention_heads="num_attention_heads",
    attention_head_dim="attention_head_dim",
    num_layers="num_layers",
    time_embed_dim="embed_dim",
    text_embed_dim="embed_dim",
    id_token_dim="embed_dim",
    num_id_tokens="depth",
    id_proj_dim="embed_dim",
    can_hidden_dim="embed_dim",
    clip_hidden_size="embed_dim",
    perceiver_dim="embed_dim",
    perceiver_depth="depth",
    perceiver_dim_head="attention_head_dim",
    num_face_tokens="queries",
)


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """The sizes of an adapter. The symbols are those of the paper (arXiv 2501.03931, Sec. 3)."""

    hidden_size: int
    """D, width of the DiT; heads x head size."""
    num_attention_heads: int
    attention_head_dim: int
    """d, size of one attention head."""
    num_layers: int
    """L, number of DiT blocks."""
    time_embed_dim: int
    """Dt, size of the time embedding (c2 in the paper)."""
    text_embed_dim: int
    """Dtxt, size of a T5 token."""
    adapted_layers: tuple[int, ...]
    """Numbers of the adapted blocks, ascending; the paper adapts every even one."""
    id_token_dim: int
    """c, size of one ID token."""
    num_id_tokens: int
    """N, number of ID tokens, and of text slots that the marked word takes."""
    id_proj_dim: int
    """c1, size of the projected ID embedding that conditions CAN."""
    can_hidden_dim: int
    """H, hidden size of CAN's MLP."""
    clip_hidden_size: int
    """Width of the ViT whose image tokens the face perceiver reads."""
    perceiver_dim: int
    """P, width of the face perceiver."""
    perceiver_depth: int
    perceiver_dim_head: int
    num_face_tokens: int
    """Q, number of learnable face queries, the length of the face stream."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "adapted_layers", tuple(self.adapted_layers))
        bad = wrong_sizes(self, _LIMITS)
        layers = self.adapted_layers
        if len(layers) > SIZES["num_layers"]:
            bad.append(f"adapted_layers has {len(layers)} blocks (at most {SIZES['num_layers']})")
        elif any(type(layer) is not int for layer in layers) or list(layers) != sorted(set(layers)) or not layers:
            bad.append(f"adapted_layers={list(layers)!r} (block numbers, ascending, at least one)")
        elif not bad and not 0 <= layers[0] <= layers[-1] < self.num_layers:
            bad.append(f"adapted_layers={list(layers)!r} (the base has blocks 0..{self.num_layers - 1})")
        if not bad and self.hidden_size != self.num_attention_heads * self.attention_head_dim:
            bad.append(
                f"hidden_size={self.hidden_size} (must be num_attention_heads x attention_head_dim = "
                f"{self.num_attention_heads * self.attention_head_dim})"
            )
        if not bad and self.perceiver_dim % self.perceiver_dim_head:
            bad.append(
                f"perceiver_dim={self.perceiver_dim} (not a multiple of perceiver_dim_head={self.perceiver_dim_head})"
            )
        if bad:
            raise ValueError("Not an adapter config: " + "; ".join(bad))

    @classmethod
    def for_base(cls, base: Mapping[str, Any], **overrides: Any) -> AdapterConfig:
        """The paper's adapter for a CogVideoX transformer config (diffusers' names); `overrides` replace fields."""
        sizes = dict(
            **base_sizes(base),
            adapted_layers=tuple(range(0, base["num_layers"], 2)),
            id_token_dim=2048,
            num_id_tokens=2,
            id_proj_dim=512,
            can_hidden_dim=1024,
            clip_hidden_size=1024,
            perceiver_dim=2048,
            perceiver_depth=4,
            perceiver_dim_head=128,
            num_face_tokens=32,
        )
        return cls(**(sizes | overrides))

    def misfits(self, base: Mapping[str, Any]) -> str:
        """In which sizes a CogVideoX transformer config is not the base of this, as "num_layers 42 instead of 30": ours
        before the base's. Empty where it fits."""
        sizes = [(name, vars(self)[name], size) for name, size in base_sizes(base).items()]
        return ", ".join(f"{name} {ours} instead of {theirs}" for name, ours, theirs in sizes if ours != theirs)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"adapted_layers": list(self.adapted_layers)}


def wrong_sizes(config: object, limits: Mapping[str, str]) -> list[str]:
    """The fields that are no size. limits: of each, by its name in `limits.SIZES`."""
    sizes = ((name, vars(config)[name], SIZES[size]) for name, size in limits.items())
    return [
        f"{name}={short(value)} (a whole number from 1 to {most})"
        for name, value, most in sizes
        if type(value) is not int or not 1 <= value <= most
    ]


def base_sizes(base: Mapping[str, Any]) -> dict[str, int]:
    """The sizes of a CogVideoX transformer config (diffusers' names) that an adapter depends on."""
    return dict(
        hidden_size=base["num_attention_heads"] * base["attention_head_dim"],
        num_attention_heads=base["num_attention_heads"],
        attention_head_dim=base["attention_head_dim"],
        num_layers=base["num_layers"],
        time_embed_dim=base["time_embed_dim"],
        text_embed_dim=base["text_embed_dim"],
    )
