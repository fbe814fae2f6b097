"""From noise to latents: the loop is diffusers' own, with the identity handed over step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from diffusers.hooks import FirstBlockCacheConfig
from torch import Tensor

from ..hosts.cogvideox_diffusers import STATE
from .clip import ClipSettings
from .conditioning import FaceConditioning

# How much the first block's change of the video may differ between two steps, relative to it, for the later step to
# reuse what the other blocks added: on the small model `balanced` costs 1% of the likeness, `fast` 3%. `dpm` adds noise
# in each step, so less can be reused at that price. docs/reference.md has all numbers.
_THRESHOLDS = {"ddim": {"balanced": 0.1, "fast": 0.22}, "dpm": {"balanced": 0.2, "fast": 0.22}}


@contextmanager
def cached_steps(transformer: CogVideoXTransformer3DModel, clip: ClipSettings) -> Iterator[None]:
    """diffusers' First Block Cache for the steps of one clip; nothing of it is left for the next one's."""
    if clip.step_cache == "off":
        yield
        return
    transformer.enable_cache(FirstBlockCacheConfig(threshold=_THRESHOLDS[clip.scheduler][clip.step_cache]))
    try:
        yield
    finally:
        transformer.disable_cache()


def denoise(
    pipe: CogVideoXPipeline,
    clip: ClipSettings,
    prompt: Tensor,
    negative: Tensor | None,
    face: FaceConditioning | None,
    on_step: Callable[[int], None] = lambda done: None,
) -> Tensor:
    """diffusers' loop, guided to the last step. Between steps, its callback hands over the next step's state and text.

    Args:
        prompt, negative: (1, T, Dtxt) on the device; negative is None without guidance.
        face: the identity, None for plain CogVideoX.
        on_step: called with the number of steps done; raise in it to cancel.

    Returns:
        (1, F', C, H / 8, W / 8).
    """
    attention_kwargs: dict[str, Any] = {}

    def prepare(step: int) -> Tensor:
        attention_kwargs.pop(STATE, None)
        if face is None or step == clip.steps:
            return prompt
        state = face.state(step)
        if state is not None:
            attention_kwargs[STATE] = state
        return face.prompt_embeds.to(prompt) if face.acting(step).fused else prompt

    def on_step_end(pipe: CogVideoXPipeline, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict:
        on_step(step + 1)
        if face is None:
            return {}
        embeds = prepare(step + 1)
        return {"prompt_embeds": embeds if negative is None else torch.cat([negative, embeds])}

    try:
        with cached_steps(pipe.transformer, clip):
            latents = pipe(
                prompt_embeds=prepare(0),
                negative_prompt_embeds=negative,
                width=clip.width,
                height=clip.height,
                num_frames=clip.num_frames,
                num_inference_steps=clip.steps,
                guidance_scale=clip.guidance_scale,
                use_dynamic_cfg=clip.dynamic_guidance,
                generator=torch.Generator("cpu").manual_seed(clip.seed),
                attention_kwargs=attention_kwargs,
                callback_on_step_end=on_step_end,
                output_type="latent",
            ).frames
    finally:
        attention_kwargs.clear()  # after an error the pipeline keeps it, and the timestep
        pipe._current_timestep = None
        if face is not None:
            face.attached.to(torch.device("cpu"))
    wanted = (clip.num_frames - 1) // pipe.vae_scale_factor_temporal + 1
    return latents[:, latents.shape[1] - wanted :]  # 1.5 pads in front to whole patches
