"""Samplers and noise levels for core's CogVideoX. For core with `comfy.ldm.cogvideo`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.model_sampling
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor
from tqdm import trange

from ..mm_core.numerics import FiniteWatch


class DDIM(comfy.samplers.KSAMPLER):
    """DDIM as CogVideoX has it, without new noise in between. A start image and a mask act as in core's samplers."""

    def __init__(self) -> None:
        super().__init__(_ddim)

    def sample(self, model_wrap: Any, *arguments: Any, **options: Any) -> Tensor:
        if isinstance(model_wrap.inner_model.model_sampling, comfy.model_sampling.V_PREDICTION_DDPM):
            model_wrap = _Scaled(model_wrap)
        return super().sample(model_wrap, *arguments, **options)


class _Scaled:
    """A model from core's loader, which wants latents of unit variance, as core's samplers see any other."""

    def __init__(self, model_wrap: Any) -> None:
        self._model_wrap = model_wrap

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model_wrap, name)

    def __call__(self, x: Tensor, sigma: Tensor, **options: Any) -> Tensor:
        scale = (1 + sigma**2).sqrt().reshape(-1, *(1 for _ in x.shape[1:]))
        return self._model_wrap(x / scale, sigma, **options)


@torch.no_grad()
def _ddim(
    model: Any,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    disable: bool | None = None,
) -> Tensor:
    """The same as core's euler, but exact where the first sigma is thousands.

    model: core's denoiser, around the guider. x: the clean latents plus sigma times noise.
    """
    finite = FiniteWatch(len(sigmas) - 1, compute_dtype(model.inner_model.model_patcher))
    for step in trange(len(sigmas) - 1, disable=disable):
        sigma = sigmas[step]
        clean = model(x, sigma * x.new_ones(len(x)), **(extra_args or {}))
        if callback is not None:
            callback({"x": x, "i": step, "sigma": sigma, "sigma_hat": sigma, "denoised": clean})
        x = clean + (x - clean) * (sigmas[step + 1] / sigma)
        finite.note(x)
    return x


def watched(callback: Callable[..., None] | None, finite: FiniteWatch) -> Callable[..., None]:
    """A sampler's callback that also watches what the model takes for the clean latents."""

    def on_step(step: int, denoised: Tensor, *state: Any) -> None:
        finite.note(denoised)
        if callback is not None:
            callback(step, denoised, *state)

    return on_step


def compute_dtype(model: ModelPatcher) -> torch.dtype:
    return model.model.manual_cast_dtype or model.model.get_dtype()


def trailing_sigmas(model: ModelPatcher, steps: int) -> Tensor:
    """(steps + 1,), the noise levels of diffusers' `trailing` spacing, and 0."""
    sigmas = model.get_model_object("model_sampling").sigmas
    levels = len(sigmas)
    timesteps = torch.arange(levels, 0, -levels / steps).round().long()[:steps] - 1
    return torch.cat([sigmas[timesteps].float().cpu(), torch.zeros(1)])
