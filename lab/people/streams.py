"""Random numbers by purpose: what one part of a person draws never moves what another part draws."""

from __future__ import annotations

import zlib

import numpy as np


def stream(purpose: str, *seeds: int) -> np.random.Generator:
    """A generator that depends on the purpose and the seeds (0 or larger) and on nothing else."""
    return np.random.default_rng([zlib.crc32(purpose.encode()), *seeds])


def pick(generator: np.random.Generator, weights: dict[str, float]) -> str:
    """One key; weights need not sum to 1."""
    total = sum(weights.values())
    return str(generator.choice(list(weights), p=[weight / total for weight in weights.values()]))
