"""RAFT with random weights: which file is taken, and the sizes of what comes out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mm_core.errors import CheckpointError
from mm_core.evaluation.raft import Raft

pytest.importorskip("torchvision.models.optical_flow", reason="needs torchvision", exc_type=ImportError)


def test_a_state_dict_becomes_a_flow(tmp_path: Path) -> None:
    from torchvision.models.optical_flow import raft_small

    torch.save(raft_small(weights=None).state_dict(), tmp_path / "raft.pth")
    frames = np.random.default_rng(0).integers(0, 256, (2, 60, 84, 3), dtype=np.uint8)
    flow = Raft(tmp_path / "raft.pth")(*frames)
    assert flow.shape == (60, 84, 2) and flow.dtype == np.float32 and np.isfinite(flow).all()


def test_other_files_are_refused(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="no state dict of torchvision's raft_small or raft_large"):
        Raft(tmp_path / "other.pth")
    (tmp_path / "damaged.pth").write_bytes(b"no weights")
    with pytest.raises(CheckpointError, match=r"damaged\.pth cannot be read"):
        Raft(tmp_path / "damaged.pth")
