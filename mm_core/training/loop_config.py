"""How long and how fast the training loop runs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import SettingError
from .optimizer import OPTIMIZERS


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long and how fast. A step is one update of the weights."""

    steps: int
    batch_size: int
    """Samples a step, over all processes and accumulation."""
    micro_batch: int | None = None
    """Samples a forward pass on one device; the rest of a step's samples are accumulated. None: no accumulation."""
    learning_rate: float = 1e-5
    final_learning_rate: float = 0.0
    """Reached at the last step, along a cosine."""
    warmup_steps: int = 0
    weight_decay: float = 1e-4
    optimizer: str = "adamw"
    """adamw, or muon for a model that begins from nothing."""
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    ema_decay: float = 0.999
    """Of the running average of the weights, which is what is exported. 0 switches it off."""
    precision: str = "no"
    """accelerate's mixed precision: no, bf16 or fp16."""
    compile: bool = False
    """Use torch.compile, on what the model has as `compiled`, else on all of it."""
    seed: int = 0
    log_every: int = 10
    save_every: int = 500
    keep: int = 2
    """Checkpoints; older ones are removed."""
    validate_every: int = 0
    """Steps between validations; 0: none."""
    skip_steps: tuple[int, ...] = ()
    """Steps whose batch is passed over, counted from 0: one at which a run stops each time."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every", "save_every", "keep"):
            if vars(self)[name] < 1:
                raise SettingError(f"{name} is {vars(self)[name]}; it must be 1 or more.")
        for name in ("learning_rate", "clip_norm"):
            if not vars(self)[name] > 0:
                raise SettingError(f"{name} is {vars(self)[name]}; it must be above 0.")
        if not 0 <= self.ema_decay < 1:
            raise SettingError(f"ema_decay is {self.ema_decay}; it must be from 0 (off) to below 1.")
        if self.precision not in ("no", "bf16", "fp16"):
            raise SettingError(f"precision is {self.precision!r}; choose no, bf16 or fp16.")
        if self.optimizer not in OPTIMIZERS:
            raise SettingError(f"optimizer is {self.optimizer!r}; choose {' or '.join(OPTIMIZERS)}.")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise SettingError(f"betas is {list(self.betas[:4])}; it must be two numbers from 0 to below 1.")
        object.__setattr__(self, "betas", tuple(self.betas))
        object.__setattr__(self, "skip_steps", tuple(self.skip_steps))

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
