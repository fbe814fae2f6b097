"""How long and how fast the training loop runs."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from ..errors import SettingError

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)
Count = Annotated[int, Field(ge=1)]
CountOrNone = Annotated[int, Field(ge=0)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LoopConfig:
    """How long and how fast. A step is one update of the weights."""

    steps: Count
    batch_size: Count
    """Samples a step, over all processes and accumulation."""
    micro_batch: Count | None = None
    """Samples a forward pass on one device; the rest of a step's samples are accumulated. None: no accumulation."""
    workers: CountOrNone = 0
    """Forked processes beside each training process that read its batches ahead. 0: it reads them itself."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-5
    final_learning_rate: Annotated[float, Field(ge=0)] = 0.0
    """Reached at the last step, along a cosine."""
    warmup_steps: CountOrNone = 0
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    use_8bit_adam: bool = False
    """bitsandbytes' AdamW, whose two moments take a byte each instead of four."""
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are scaled down to this norm."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Of the running average of the weights, which is what is exported. 0 switches it off."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """accelerate's mixed precision."""
    compile: bool = False
    """Use torch.compile, on what the task has as `compiled`."""
    seed: int = 0
    log_every: Count = 10
    save_every: Count = 500
    keep: Count = 2
    """Checkpoints; older ones are removed."""
    validate_every: CountOrNone = 0
    """Steps between validations; 0: none."""
    skip_steps: tuple[int, ...] = ()
    """Steps whose batch is passed over, counted from 0: one at which a run stops each time."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the frozen models, which need no other copy to compute in."""
        return {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up, then a cosine from `learning_rate` to `final_learning_rate`."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        part = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        span = self.learning_rate - self.final_learning_rate
        return self.final_learning_rate + span * (1 + math.cos(math.pi * min(part, 1))) / 2

    def accumulation(self, processes: int) -> int:
        """Forward passes a step on each of so many processes."""
        micro = self.micro_batch or -(-self.batch_size // processes)
        if self.batch_size % (micro * processes):
            raise SettingError(
                f"batch_size {self.batch_size} does not divide into {processes} process(es) x micro_batch {micro}: "
                f"choose a multiple of {micro * processes}."
            )
        return self.batch_size // (micro * processes)
