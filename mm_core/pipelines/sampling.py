"""From prompt and identity to latents. The denoising loop is diffusers' own `CogVideoXPipeline`; here is prepared what
the identity adds, and watched what comes of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler
from torch import Tensor

from ..errors import OutOfMemoryError
from ..numerics import FiniteWatch, precision_name
from ..out_of_memory import out_of_memory_as
from .clip import ClipSettings, StepCallback
from .conditioning import FaceConditioning, condition
from .control import AdapterSettings
from .denoise import denoise
from .identity import Identity
from .loaded import LoadedBase
from .prompt import IdentityTokens, without_trigger

SCHEDULERS = {"ddim": CogVideoXDDIMScheduler, "dpm": CogVideoXDPMScheduler}

Encode = Callable[[str | Sequence[int]], Tensor]
"""A prompt, or its token ids, to embeddings, (1, T, Dtxt)."""


@torch.no_grad()
def sample(
    loaded: LoadedBase,
    encode: Encode,
    clip: ClipSettings,
    identity: Identity | None,
    tokens: IdentityTokens | None,
    settings: AdapterSettings,
    on_step: StepCallback | None,
    beside: int = 0,
) -> Tensor:
    """Sample latents, (1, C, F', H / 8, W / 8), on the CPU.

    Args:
        identity: None for plain CogVideoX.
        tokens: of the prompt with room for the identity; None where the settings leave the prompt as it is.
        beside: bytes of the device that the clip needs beside the weights.

    Raises:
        NumericsError: latents that are not finite. OutOfMemoryError: the clip does not fit. Whatever `on_step` raises.
        The device is freed as after a finished run.
    """
    pipe, device, scheduler = loaded.pipe, loaded.device, loaded.pipe.scheduler
    pipe.scheduler, watch = watched_scheduler(SCHEDULERS[clip.scheduler], pipe.scheduler.config, clip, loaded.dtype)

    def report(step: int) -> None:
        if on_step is not None:
            on_step(step, clip.steps, lambda: loaded.preview.draw(watch["x0"]))

    try:
        prompt = encode(without_trigger(clip.prompt)).to(device)
        negative = encode(clip.negative_prompt).to(device) if clip.guidance_scale > 1 else None
        marked = prompt if tokens is None else encode(tokens.ids).to(device)
        with out_of_memory_as(partial(_does_not_fit, clip, loaded)), loaded.transformer.ready(beside):
            face = None
            if identity is not None:
                face = _condition(loaded, clip, identity, tokens, settings, marked)
            latents = denoise(pipe, clip, prompt, negative, face, report)
    finally:
        pipe.scheduler = scheduler
        watch.clear()  # latents on the device
    return latents.permute(0, 2, 1, 3, 4).cpu()


def _condition(
    loaded: LoadedBase,
    clip: ClipSettings,
    identity: Identity,
    tokens: IdentityTokens | None,
    settings: AdapterSettings,
    prompt: Tensor,
) -> FaceConditioning:
    # Without guidance there is no unconditional half.
    settings = replace(settings, in_negative=settings.in_negative and clip.guidance_scale > 1)
    scheduler = loaded.pipe.scheduler
    scheduler.set_timesteps(clip.steps)
    return condition(
        loaded.attached,
        identity,
        prompt,
        tokens.slots if tokens else (),
        scheduler.timesteps,
        settings,
        loaded.device,
    )


def watched_scheduler(
    cls: type, config: Any, clip: ClipSettings, dtype: torch.dtype
) -> tuple[Any, dict[str, Tensor]]:
    """A scheduler whose steps are watched: that their latents are finite, and what they take for the clean latents,
    `x0`, to be drawn, since `x_t` is mostly noise."""
    scheduler, last = cls.from_config(config), {}
    step, finite = scheduler.step, FiniteWatch(clip.steps, dtype)

    @functools.wraps(step)
    def watched(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        result = step(*args, **kwargs)
        finite.note(result[0])
        last["x0"] = result[1]
        return result

    scheduler.step = watched
    return scheduler, last


def _does_not_fit(clip: ClipSettings, loaded: LoadedBase, reason: str) -> OutOfMemoryError:
    return OutOfMemoryError(
        "Not enough memory to sample {frames} frames of {width} x {height} (offload {policy}, {precision}). Try a "
        "stronger offload (model, group, sequential), fp8 as precision, or a smaller or shorter clip; close what else "
        "uses the memory. ({reason})",
        key="out_of_memory", frames=clip.num_frames, width=clip.width, height=clip.height,
        policy=loaded.residence.policy, precision=precision_name(loaded.dtype), reason=reason,
    )  # fmt: skip
