"""The optimizer of a run whose task brings none: AdamW."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import SettingError
from .loop_config import LoopConfig

BETAS = (0.9, 0.95)


def adamw(model: nn.Module, config: LoopConfig) -> torch.optim.Optimizer:
    """Of what requires gradients. Matrices decay; biases, norms and other vectors do not.

    Raises SettingError for `use_8bit_adam` without bitsandbytes.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    kind = _adamw_8bit() if config.use_8bit_adam else torch.optim.AdamW
    return kind(groups, lr=config.learning_rate, betas=BETAS)


def _adamw_8bit() -> type[torch.optim.Optimizer]:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise SettingError(
            f'use_8bit_adam needs bitsandbytes ({error}): python -m pip install ".[quantized]", or set it to false.'
        ) from error
    return AdamW8bit
