"""The Inception Score of a set of clips' frames, by torchmetrics: how sharp and how varied they are."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from ..errors import MagicMirrorError, downloading
from .weights import load_weights

DOWNLOAD = "download"
"""In place of a file: TensorFlow's weights of 2015, torchmetrics' default, which torch-fidelity fetches."""
_SIZE = 299  # pixels


class Inception:
    """`add` frames, then ask for the `score`.

    weights: DOWNLOAD, or a state dict of torchvision's inception_v3.

    Raises CheckpointError if the file is none, MagicMirrorError where a package is missing or nothing can be fetched.
    """

    def __init__(self, weights: Path | str) -> None:
        try:
            from torchmetrics.image.inception import InceptionScore
        except ImportError as error:
            raise MagicMirrorError(
                "The Inception Score needs torchmetrics, which is not installed. Install it with: "
                "python -m pip install torchmetrics"
            ) from error
        warnings.filterwarnings("ignore", "Metric `InceptionScore` will save all", UserWarning)  # a few KB a clip
        if str(weights) != DOWNLOAD:
            self._metric = InceptionScore(_torchvision(Path(weights)))
            return
        if importlib.util.find_spec("torch_fidelity") is None:
            raise MagicMirrorError(
                f"The Inception Score with {DOWNLOAD} needs torch-fidelity, which is not installed. Install it with: "
                "python -m pip install torch-fidelity, or give a file of torchvision's inception_v3"
            )
        with downloading("the weights of Inception by torch-fidelity"):
            self._metric = InceptionScore()

    def add(self, frames: Sequence[np.ndarray]) -> None:
        """Some of a clip's frames, (H, W, 3) uint8 RGB each."""
        with torch.inference_mode():
            self._metric.update(torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2))

    @property
    def score(self) -> float:
        """1 and up, over up to ten parts of the frames in a random order that is the same every time. NaN without any.
        """
        if not self._metric.features:
            return float("nan")
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return float(self._metric.compute()[0])


class _Logits(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, frames: Tensor) -> Tensor:
        """(N, 3, H, W) uint8 -> (N, 1000)."""
        frames = interpolate(frames.float(), (_SIZE, _SIZE), mode="bilinear", antialias=True)
        return self.network(frames / 127.5 - 1)


def _torchvision(file: Path) -> nn.Module:
    from torchvision.models import inception_v3

    with torch.device("meta"):
        network = inception_v3(weights=None, init_weights=False)
    remedy = f"Give its inception_v3_google file, or {DOWNLOAD}"
    load_weights(network, file, "the weights of torchvision's inception_v3", remedy)
    return _Logits(network)
