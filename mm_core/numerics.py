"""Numbers that are none: an overflow is told with its step and a remedy instead of becoming a black clip."""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import NumericsError

_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


def precision_name(dtype: torch.dtype) -> str:
    """A type as the precision option names it."""
    return _NAMES.get(dtype, str(dtype).removeprefix("torch."))


def remedy(dtype: torch.dtype) -> str:
    """What to try where numbers of this type are not finite."""
    if dtype == torch.float16:
        return "fp16 ends at 65,504: choose bf16 as precision, or fp32 where the device has no bf16."
    damaged = "If it stays, a LoRA is too strong, or a file of weights is damaged: Model Doctor compares their hashes."
    return damaged if dtype == torch.float32 else f"Choose fp32 as precision. {damaged}"


class FiniteWatch:
    """Watches that the latents of a denoising loop stay finite.

    Each step leaves one bool on the device. It is read after the first step, where an overflow mostly shows, then at
    each quarter: five times a clip however many steps it has.
    """

    def __init__(self, steps: int, dtype: torch.dtype) -> None:
        """steps: of the loop. dtype: what the model computes in, to name the remedy."""
        self._steps, self._dtype = steps, dtype
        self._read_after = {1, *(round(steps * part / 4) for part in (1, 2, 3, 4))}
        self._finite: list[Tensor] = []

    def note(self, latents: Tensor) -> None:
        """After each step. Raises NumericsError, naming the first step whose latents are not finite."""
        self._finite.append(latents.isfinite().all())
        if len(self._finite) in self._read_after:
            self._check()

    def _check(self) -> None:
        finite = torch.stack(self._finite).cpu()
        if finite.all():
            return
        step = int((~finite).nonzero()[0]) + 1
        if self._dtype == torch.float16:
            raise NumericsError(
                "After step {step} of {steps} the latents are not finite (NaN or infinity): fp16 ends at 65,504. "
                "Choose bf16 as precision, or fp32 where the device has no bf16; and from Load CLIP a T5 in bf16 or "
                "fp32.",
                key="not_finite_fp16",
                step=step,
                steps=self._steps,
            )
        raise NumericsError(
            "After step {step} of {steps} the latents are not finite (NaN or infinity), in {precision}. Try fp32 as "
            "precision. If they are not finite in fp32, a LoRA is too strong or a file of weights is damaged: Model "
            "Doctor compares their hashes.",
            key="not_finite",
            step=step,
            steps=self._steps,
            precision=precision_name(self._dtype),
        )
