"""What is sampled, and what comes of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from ..choices import AS_MODEL, DRAFT, SCHEDULERS, STEP_CACHES
from ..errors import SettingError
from .presets import ClipLimits, Sampling
from .prompt import check_text

StepCallback = Callable[[int, int, Callable[[], Image.Image]], None]
"""(steps done, all steps, function that draws a preview). Raise in it to cancel."""


@dataclass(frozen=True, kw_only=True)
class ClipSettings:
    """What to sample."""

    prompt: str
    """Names the person: a word before the trigger `img`, or the first identity word."""
    negative_prompt: str = ""
    width: int
    """Pixels, a multiple of 16."""
    height: int
    num_frames: int
    """8N + 1 (CogVideoX 1.0) or 16N + 1 (1.5); 1 makes an image."""
    steps: int = 50
    """Denoising steps, 1 to 1000."""
    guidance_scale: float = 6.0
    """Classifier-free guidance; 1 switches it off and halves the work."""
    dynamic_guidance: bool = True
    """Let the guidance grow along the schedule, as diffusers' `use_dynamic_cfg`; goes with `dpm`."""
    scheduler: str = "dpm"
    """`ddim` or `dpm`, CogVideoX's own."""
    step_cache: str = "off"
    """One of `STEP_CACHES`; `off` computes every step."""
    seed: int = 0
    """The same seed gives the same noise on every device."""

    @classmethod
    def of_model(
        cls,
        limits: ClipLimits,
        sampling: Sampling,
        *,
        width: int = 0,
        height: int = 0,
        num_frames: int = 0,
        steps: int = 0,
        guidance_scale: float = 0.0,
        dynamic_guidance: bool = True,
        scheduler: str = AS_MODEL,
        **more: str | int,
    ) -> ClipSettings:
        """Settings in which 0, and AS_MODEL, stand for what a base model does best; with DRAFT, for a draft.

        dynamic_guidance goes with a scheduler that is chosen; AS_MODEL and DRAFT bring their own.
        """
        as_model = scheduler in (AS_MODEL, DRAFT)
        if scheduler == DRAFT:
            sampling = sampling.draft
        return cls(
            width=width or limits.width,
            height=height or limits.height,
            num_frames=num_frames or limits.num_frames,
            steps=steps or sampling.steps,
            guidance_scale=guidance_scale or sampling.guidance_scale,
            dynamic_guidance=sampling.dynamic_guidance if as_model else dynamic_guidance,
            scheduler=sampling.scheduler if as_model else scheduler,
            **more,
        )

    @property
    def summary(self) -> str:
        """One line, to show to the user."""
        guidance = f"{'dynamic ' if self.dynamic_guidance else ''}guidance {self.guidance_scale:g}"
        cached = f", step cache {self.step_cache}" * (self.step_cache != "off")
        size = f"{self.width} x {self.height} px, {self.num_frames} frame{'s' * (self.num_frames > 1)}"
        return f"{size}, {self.steps} {self.scheduler} steps{cached}, {guidance}, seed {self.seed}"

    def __post_init__(self) -> None:
        check_text(self.prompt)
        check_text(self.negative_prompt)
        if not 1 <= self.steps <= 1000:
            raise SettingError(f"steps is {self.steps}; it must be from 1 to 1000.")
        if not -(2**63) <= self.seed < 2**64:  # what torch's generators take
            raise SettingError(f"seed is {self.seed}; it must be from {-(2**63)} to {2**64 - 1}.")
        if not math.isfinite(self.guidance_scale) or not 1 <= self.guidance_scale <= 30:
            raise SettingError(f"guidance_scale is {self.guidance_scale}; it must be a number from 1 (off) to 30.")
        if self.scheduler not in SCHEDULERS:
            raise SettingError(f"The scheduler is {self.scheduler!r}; choose one of {', '.join(SCHEDULERS)}.")
        if self.step_cache not in STEP_CACHES:
            raise SettingError(f"step_cache is {self.step_cache!r}; choose one of {', '.join(STEP_CACHES)}.")


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A finished clip."""

    frames: Tensor
    """(F, H, W, 3), RGB in 0..1."""
    latents: Tensor
    """(1, C, F', H / 8, W / 8), what the VAE decoded, times its scaling factor."""
    fps: int
    """The rate that the model was trained at."""
