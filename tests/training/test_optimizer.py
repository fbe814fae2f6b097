"""Muon: its updates are orthogonal and as large as AdamW's; what is no matrix takes AdamW's step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mm_core.training.optimizer import Muon, orthogonal, parameter_groups


@pytest.mark.parametrize("shape", [(12, 40), (40, 12)])
def test_singular_values_become_one(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape) * torch.logspace(-1, 1, shape[1])  # of up to 139 times each other's size
    values = torch.linalg.svdvals(orthogonal(matrix))
    assert values.min() > 0.5 and values.max() < 1.3


def test_the_same_whatever_the_size_of_the_gradient() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(8, 16)
    torch.testing.assert_close(orthogonal(matrix), orthogonal(1000 * matrix), rtol=1e-4, atol=1e-5)


def test_groups() -> None:
    """Kernels and weights are matrices; biases, norms and embeddings are not; frozen ones are in no group."""
    model = nn.ModuleDict(
        {"conv": nn.Conv3d(2, 4, 3), "norm": nn.LayerNorm(4), "words": nn.Embedding(5, 4), "out": nn.Linear(4, 2)}
    )
    model["out"].requires_grad_(False)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, 0.1)
    found = [([names[id(p)] for p in g["params"]], g["weight_decay"], g["orthogonal"]) for g in groups]
    assert found == [
        (["conv.weight"], 0.1, True),
        (["words.weight"], 0.1, False),
        (["conv.bias", "norm.weight", "norm.bias"], 0.0, False),
    ]


def test_vectors_take_adamws_step() -> None:
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.ones(6)) for _ in range(2))
    muon = Muon([{"params": [ours], "weight_decay": 0.1, "orthogonal": False}], lr=0.01, betas=(0.9, 0.95))
    adamw = torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
    for _ in range(5):
        ours.grad = torch.randn(6)
        theirs.grad = ours.grad.clone()
        muon.step()
        adamw.step()
    assert torch.equal(ours, theirs)


def test_an_update_is_as_large_as_the_learning_rate_says() -> None:
    """Whatever the layer's shape, as AdamW's: a fifth of the learning rate in the root mean square."""
    torch.manual_seed(0)
    for shape in ((32, 128), (128, 32), (16, 4, 3, 3, 3)):
        weight = nn.Parameter(torch.zeros(shape))
        optimizer = Muon([{"params": [weight], "orthogonal": True}], lr=0.01, betas=(0.9, 0.95))
        weight.grad = torch.randn(shape)
        optimizer.step()
        assert 0.0012 < weight.square().mean().sqrt() < 0.0025
