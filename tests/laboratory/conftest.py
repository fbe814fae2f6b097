"""The laboratory's tests use the helpers of the trainer's."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import send_to_device
from torch import nn

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "training")]


@pytest.fixture
def same_on_a_device() -> Callable[..., None]:
    """Check that a task's losses of a batch are the CPU's on an accelerator, and that gradients come back.

    others: what follows the model there by itself, and is to be the CPU's again.
    """
    from accelerator import simulated

    def check(model: nn.Module, batch: dict[str, Any], *others: nn.Module) -> None:
        expected = model(batch)["loss"].detach()
        with simulated() as accelerator:
            model.to(accelerator.device)
            found = model(send_to_device(batch, accelerator.device))["loss"]
            found.mean().backward()
            assert torch.allclose(found.detach().cpu(), expected, rtol=1e-3, atol=1e-4)
            for module in (model, *others):
                module.to("cpu").zero_grad()

    return check
