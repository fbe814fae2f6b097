"""The optimizer of a run whose task brings none: AdamW."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .loop_config import LoopConfig

BETAS = (0.9, 0.95)


def adamw(model: nn.Module, config: LoopConfig) -> torch.optim.AdamW:
    """Of what requires gradients. Matrices decay; biases, norms and other vectors do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=config.learning_rate, betas=BETAS)
