"""All that is random about a run follows from its seed and a sample's number."""

from __future__ import annotations

import torch
from torch import Tensor


def generator_for(seed: int, *numbers: int) -> torch.Generator:
    """A random generator that depends on the numbers alone."""
    mixed = seed
    for number in numbers:
        mixed = (mixed * 6364136223846793005 + number + 1442695040888963407) % (1 << 63)
        mixed ^= mixed >> 29
    return torch.Generator().manual_seed(mixed)


def shuffled(sample: int, size: int, seed: int) -> int:
    """Which of `size` items a run's sample is: each epoch is a new permutation of all of them."""
    epoch, place = divmod(sample, size)
    return int(_permutation(epoch, size, seed)[place])


_permutations: dict[tuple[int, int, int], Tensor] = {}


def _permutation(epoch: int, size: int, seed: int) -> Tensor:
    key = (epoch, size, seed)
    if key not in _permutations:
        if len(_permutations) > 8:
            _permutations.clear()
        _permutations[key] = torch.randperm(size, generator=generator_for(seed, epoch, size))
    return _permutations[key]
