"""The Inception Score: known answers, the real network with random weights, what is told where something is missing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.models import inception_v3

from mm_core.errors import CheckpointError, MagicMirrorError
from mm_core.evaluation import inception
from mm_core.evaluation.inception import DOWNLOAD, Inception


class ByColour(nn.Module):
    """Four classes, sure of each: by the brightness."""

    def forward(self, frames: Tensor) -> Tensor:
        return 100 * nn.functional.one_hot(frames[:, 0, 0, 0].long() // 64, 4).float()


def test_one_kind_of_frame_is_1_and_four_kinds_are_4(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inception, "_torchvision", lambda file: ByColour())
    frames = np.zeros((400, 8, 8, 3), np.uint8) + np.arange(0, 256, 64, dtype=np.uint8).repeat(100)[:, None, None, None]
    same, all_kinds = Inception("file"), Inception("file")
    assert np.isnan(same.score)
    same.add(frames[:100])
    all_kinds.add(frames)
    assert same.score == pytest.approx(1)
    assert all_kinds.score == pytest.approx(4, abs=0.3) and all_kinds.score == all_kinds.score  # ten parts of forty


def test_torchvisions_network_from_a_file(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(inception_v3(weights=None, init_weights=False).state_dict(), tmp_path / "inception.pth")
    measured = Inception(tmp_path / "inception.pth")
    measured.add(np.random.default_rng(0).integers(0, 256, (2, 40, 60, 3), dtype=np.uint8))
    assert measured.score >= 1


def test_what_is_missing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere.pth does not hold.*inception_v3_google"):
        Inception(tmp_path / "nowhere.pth")
    with pytest.raises(MagicMirrorError, match="pip install torch-fidelity"):  # it is not in the tests' environment
        Inception(DOWNLOAD)
    monkeypatch.setitem(__import__("sys").modules, "torchmetrics.image.inception", None)
    with pytest.raises(MagicMirrorError, match="pip install torchmetrics"):
        Inception(DOWNLOAD)
