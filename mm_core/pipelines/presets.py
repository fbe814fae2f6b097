"""The base models: published CogVideoX configs, and what each can make."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..choices import TINY
from ..errors import SettingError

HUB_ADDRESS = "https://huggingface.co"

_TRANSFORMER_5B = dict(
    num_attention_heads=48,
    attention_head_dim=64,
    num_layers=42,
    time_embed_dim=512,
    text_embed_dim=4096,
    in_channels=16,
    out_channels=16,
    sample_frames=49,
    sample_height=60,
    sample_width=90,
    use_rotary_positional_embeddings=True,
)
_VAE = dict(
    block_out_channels=(128, 256, 256, 512),
    down_block_types=("CogVideoXDownBlock3D",) * 4,
    up_block_types=("CogVideoXUpBlock3D",) * 4,
    latent_channels=16,
    layers_per_block=3,
    norm_num_groups=32,
    sample_height=480,
    sample_width=720,
)
TINY_TRANSFORMER = dict(
    num_attention_heads=6,
    attention_head_dim=32,
    num_layers=8,
    time_embed_dim=128,
    text_embed_dim=128,
    in_channels=16,
    out_channels=16,
    max_text_seq_length=48,
    sample_frames=9,
    sample_height=16,
    sample_width=16,
    use_rotary_positional_embeddings=True,
)
# One level less than the published VAE: 4 px a latent instead of 8, so that at 64 px a face has 64 tokens, not 16.
TINY_VAE = dict(
    block_out_channels=(16, 32, 64),
    down_block_types=("CogVideoXDownBlock3D",) * 3,
    up_block_types=("CogVideoXUpBlock3D",) * 3,
    latent_channels=16,
    layers_per_block=1,
    norm_num_groups=8,
    sample_height=64,
    sample_width=64,
    scaling_factor=1.0,
)
SCHEDULER = dict(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    clip_sample=False,
    prediction_type="v_prediction",
    rescale_betas_zero_snr=True,
    set_alpha_to_one=True,
    timestep_spacing="trailing",
)
T5_XXL = dict(
    vocab_size=32128,
    d_model=4096,
    d_kv=64,
    d_ff=10240,
    num_layers=24,
    num_heads=64,
    feed_forward_proj="gated-gelu",
    tie_word_embeddings=False,
)

TEMPORAL_COMPRESSION = 4
"""Frames of a latent frame of CogVideoX's VAE; the first one holds one."""


def spatial_compression(vae: Mapping[str, Any]) -> int:
    """Pixels of a latent, along each side, of a VAE with this config."""
    return 2 ** (len(vae["block_out_channels"]) - 1)


def latent_shape(vae: Mapping[str, Any], *, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
    """(C, F', H', W'), what such a VAE makes of a clip."""
    cell = spatial_compression(vae)
    return vae["latent_channels"], (frames - 1) // TEMPORAL_COMPRESSION + 1, height // cell, width // cell


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A published CogVideoX text-to-video model, as diffusers configs."""

    repo: str
    """Its name on the Hugging Face hub."""
    transformer: Mapping[str, Any]
    vae: Mapping[str, Any]
    scheduler: Mapping[str, Any]


PRESETS = {
    "CogVideoX-5b": Preset(
        repo="THUDM/CogVideoX-5b",
        transformer=_TRANSFORMER_5B,
        vae=_VAE | dict(scaling_factor=0.7),
        scheduler=SCHEDULER | dict(snr_shift_scale=1.0),
    ),
    "CogVideoX-2b": Preset(
        repo="THUDM/CogVideoX-2b",
        transformer=_TRANSFORMER_5B
        | dict(num_attention_heads=30, num_layers=30, use_rotary_positional_embeddings=False),
        vae=_VAE | dict(scaling_factor=1.15258426),
        scheduler=SCHEDULER | dict(snr_shift_scale=3.0),
    ),
    "CogVideoX1.5-5B": Preset(
        repo="THUDM/CogVideoX1.5-5B",
        transformer=_TRANSFORMER_5B
        | dict(patch_size_t=2, patch_bias=False, sample_frames=81, sample_height=300, sample_width=300),
        vae=_VAE | dict(scaling_factor=0.7, invert_scale_latents=True),
        scheduler=SCHEDULER | dict(snr_shift_scale=1.0),
    ),
}


def published(name: str) -> Preset | None:
    """The published model of this name, with its owner or without; None for any other name."""
    return next((preset for preset in PRESETS.values() if name in (preset.repo, preset.repo.split("/")[-1])), None)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a base model samples where nothing else is asked for."""

    steps: int = 50
    guidance_scale: float = 6.0
    dynamic_guidance: bool = True
    scheduler: str = "dpm"

    @property
    def draft(self) -> Sampling:
        """A third of the work of 50 steps; docs/reference.md has its price."""
        return replace(self, steps=min(self.steps, 16), dynamic_guidance=False)


MAX_AREA, ODD_AREAS = 4.0, (0.25, 1.5)
"""Of a frame, in areas of the frame that a model makes best: what is refused beyond, and what is warned of outside."""


@dataclass(frozen=True, kw_only=True)
class ClipLimits:
    """Lengths and sizes that a base model can make, from its configs."""

    frame_step: int
    """Lengths are `frame_step` x N + 1."""
    max_frames: int
    size_step: int
    """Width and height are multiples of this, in pixels."""
    max_height: int | None
    max_width: int | None
    """Only 1.5 has them: its rotary grid is cut from one of fixed size."""
    fps: int
    """Frame rate of the clips that the model was trained on."""
    width: int
    height: int
    num_frames: int
    """The clip that the model makes best."""

    @classmethod
    def from_config(cls, transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> ClipLimits:
        spatial = spatial_compression(vae)
        is_1_5 = transformer.get("patch_size_t") is not None
        # The VAE decodes latent frames in pairs and gives a clip back at its own length only when one is left over; 1.5
        # patches the pairs once more.
        frame_step = 2 * transformer.get("temporal_compression_ratio", 4) * (2 if is_1_5 else 1)
        return cls(
            frame_step=frame_step,
            max_frames=161 if is_1_5 else transformer["sample_frames"],
            size_step=spatial * transformer.get("patch_size", 2),
            max_height=transformer["sample_height"] * spatial if is_1_5 else None,
            max_width=transformer["sample_width"] * spatial if is_1_5 else None,
            fps=16 if is_1_5 else 8,
            width=1360 if is_1_5 else transformer["sample_width"] * spatial,
            height=768 if is_1_5 else transformer["sample_height"] * spatial,
            num_frames=transformer["sample_frames"],
        )

    def check(self, *, width: int, height: int, num_frames: int) -> None:
        """Raise SettingError, with the nearest value that works, for a clip that the model cannot make."""
        for name, value, limit in (("width", width, self.max_width), ("height", height, self.max_height)):
            if value < self.size_step or value % self.size_step:
                near = max(self.size_step, round(value / self.size_step) * self.size_step)
                raise SettingError(
                    "The {side} is {value} px; it must be a multiple of {step}. Try {near}.",
                    key="side_step", side=name, value=value, step=self.size_step, near=near,
                )  # fmt: skip
            if limit is not None and value > limit:
                raise SettingError(
                    "The {side} is {value} px; this model makes at most {limit}.",
                    key="side_limit", side=name, value=value, limit=limit,
                )  # fmt: skip
        if width * height > MAX_AREA * self.width * self.height:
            raise SettingError(
                "{width} x {height} px is far beyond what this model was trained at, {best_width} x {best_height}: "
                "take that, or at most {limit:g} times its area.",
                key="size_beyond", width=width, height=height, best_width=self.width, best_height=self.height,
                limit=MAX_AREA,
            )  # fmt: skip
        step = self.frame_step
        if num_frames < 1 or num_frames > self.max_frames:
            raise SettingError(
                "The clip has {frames} frames; this model makes 1 (an image) to {limit}.",
                key="length_limit", frames=num_frames, limit=self.max_frames,
            )  # fmt: skip
        if num_frames % step != 1:
            below = num_frames // step * step + 1 if num_frames % step else num_frames - step + 1
            near = min(below + step, self.max_frames)
            raise SettingError(
                "The clip has {frames} frames; this model makes {step} x N + 1 of them. Try {below} or {near}.",
                key="length_step", frames=num_frames, step=step, below=below, near=near,
            )  # fmt: skip

    def cautions(self, *, width: int, height: int) -> list[str]:
        """What to say of a size that is allowed and was not trained."""
        low, high = ODD_AREAS
        if low <= width * height / (self.width * self.height) <= high:
            return []
        return [
            f"This model was trained at {self.width} x {self.height} px; at {width} x {height} faces may fall apart."
        ]


def limits_of(name: str) -> ClipLimits:
    """Of `tiny` or a published model, with its owner or without; no library is loaded. Raises SettingError."""
    preset = published(name)
    if preset is not None:
        return ClipLimits.from_config(preset.transformer, preset.vae)
    if name != TINY:
        raise SettingError(f"The model is {name}; it must be {TINY} or one of {', '.join(PRESETS)}.")
    return ClipLimits.from_config(TINY_TRANSFORMER, TINY_VAE)
