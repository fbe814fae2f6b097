"""The optimizers: torch's AdamW, and Muon for models that are trained from nothing, as the small one is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

# Quintic Newton-Schulz iteration: singular values go to about 0.7 .. 1.2 in five steps, which is as good as 1.
COEFFICIENTS, ITERATIONS = (3.4445, -4.7750, 2.0315), 5
RMS = 0.2
"""Of an update of learning rate 1, as those of AdamW are: one learning rate and one weight decay serve both."""
# Liu et al. 2025, arXiv 2502.16982, Eq. 4.


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Of what requires gradients. Matrices decay; biases, norms and other vectors do not.

    `orthogonal` says which ones Muon treats as matrices: not embeddings, whose rows have nothing to do with each other.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    parameters = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in parameters if p.ndim > 1]
    groups = [
        {"params": [p for p in matrices if id(p) not in embeddings], "weight_decay": weight_decay, "orthogonal": True},
        {"params": [p for p in matrices if id(p) in embeddings], "weight_decay": weight_decay, "orthogonal": False},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0, "orthogonal": False},
    ]
    return [group for group in groups if group["params"]]


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are made orthogonal, so that every direction of a layer learns (Jordan et al. 2024).

    Groups with `orthogonal=True` hold matrices, or kernels read as (out, in * size); the others take AdamW's step.
    torch has a Muon since 2.9, for matrices only.

    momentum: of the orthogonal groups. betas: of the others.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        momentum: float = 0.95,
        eps: float = 1e-8,
    ) -> None:
        defaults = dict(lr=lr, betas=betas, momentum=momentum, eps=eps, weight_decay=0.0, orthogonal=False)
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if group["orthogonal"]:
                for parameter in parameters:
                    self._orthogonal_step(parameter, group)
            elif parameters:
                self._adamw_step(parameters, group)

    def _orthogonal_step(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum = state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
        update = orthogonal(parameter.grad.lerp(momentum, group["momentum"]).flatten(1))  # Nesterov's look ahead
        scale = RMS * max(update.shape) ** 0.5
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update.view_as(parameter), alpha=-group["lr"] * scale)

    def _adamw_step(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter] = {
                    "step": torch.zeros(()),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        states = [self.state[parameter] for parameter in parameters]
        adamw(
            parameters,
            [parameter.grad for parameter in parameters],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def orthogonal(matrix: Tensor) -> Tensor:
    """(m, n): the matrix with all its singular values near 1."""
    a, b, c = COEFFICIENTS
    flat = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    flat = flat / flat.norm().clamp_min(1e-7)
    for _ in range(ITERATIONS):
        square = flat @ flat.T
        flat = a * flat + (b * square + c * square @ square) @ flat
    return flat.T if matrix.shape[0] > matrix.shape[1] else flat


OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {"adamw": torch.optim.AdamW, "muon": Muon}
