"""The small model's optimizers: Muon for the matrices of models that begin from nothing, AdamW for all else."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mm_core.errors import SettingError
from mm_core.training.loop_config import LoopConfig
from mm_core.training.optimizer import BETAS


def muon(model: nn.Module, config: LoopConfig, betas: tuple[float, float] = BETAS) -> list[torch.optim.Optimizer]:
    """Of what requires gradients (Jordan et al. 2024). betas: of AdamW.

    Its updates are as large as AdamW's (Liu et al. 2025, arXiv 2502.16982), so that one learning rate serves both. Not
    for embeddings, whose rows have nothing to do with each other, nor for kernels, which torch's Muon does not take.

    Raises SettingError for fp16, whose gradients are scaled for one optimizer, and where torch is older than 2.9.
    """
    if config.precision == "fp16" or not hasattr(torch.optim, "Muon"):
        raise SettingError("Muon needs torch 2.9 or later, and a precision of no or bf16.")
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    parameters = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in parameters if p.ndim == 2 and id(p) not in embeddings]
    chosen = {id(p) for p in matrices}
    rest = [p for p in parameters if id(p) not in chosen]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in rest if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
    ]
    rate, optimizers = config.learning_rate, []
    if matrices:
        decay = config.weight_decay
        optimizers.append(torch.optim.Muon(matrices, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"))
    if groups := [group for group in groups if group["params"]]:
        optimizers.append(torch.optim.AdamW(groups, lr=rate, betas=betas))
    return optimizers
