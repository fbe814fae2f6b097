"""Features in shards of three, made in a process of their own."""

from __future__ import annotations

from pathlib import Path

import torch

from mm_core.data import precompute
from mm_core.data.frozen import FeatureSettings

SAMPLES = 3


def run(settings: FeatureSettings, folder: Path, rank: int, processes: int) -> None:
    torch.set_num_threads(1)
    precompute.SAMPLES_PER_SHARD = SAMPLES
    precompute.precompute(settings, folder, rank=rank, world_size=processes)
