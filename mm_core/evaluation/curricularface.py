"""CurricularFace's network, the recogniser of FaceSim-Cur, with the weights that OpenS2V-Eval and ConsisID publish."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from .weights import load_weights

WEIGHTS = "glint360k_curricular_face_r101_backbone.bin"
_STAGES = ((64, 64, 3), (64, 128, 13), (128, 256, 30), (256, 512, 3))  # channels in, out, and how many units


class _Unit(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.shortcut_layer = nn.MaxPool2d(1, stride)
        if inputs != outputs:
            convolution = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut_layer = nn.Sequential(convolution, nn.BatchNorm2d(outputs))
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(inputs),
            nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.PReLU(outputs),
            nn.Conv2d(outputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.res_layer(x) + self.shortcut_layer(x)


class IResNet101(nn.Module):
    """The 101 layers of TFace's "IR" family, under its key names."""

    def __init__(self) -> None:
        super().__init__()
        self.input_layer = nn.Sequential(nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.PReLU(64))
        units = []
        for inputs, outputs, count in _STAGES:
            units += [_Unit(inputs, outputs, 2), *(_Unit(outputs, outputs, 1) for _ in range(count - 1))]
        self.body = nn.Sequential(*units)
        self.output_layer = nn.Sequential(
            nn.BatchNorm2d(512), nn.Dropout(), nn.Flatten(), nn.Linear(512 * 7 * 7, 512),
            nn.BatchNorm1d(512, affine=False),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, 112, 112) RGB, -1 to 1 -> (B, 512), not normalised."""
        return self.output_layer(self.body(self.input_layer(x)))


class CurricularFace:
    """The network with weights from a file, on the CPU. Raises CheckpointError if the file does not hold them."""

    def __init__(self, file: Path) -> None:
        with torch.device("meta"):
            self._network = IResNet101()
        remedy = f"Give {WEIGHTS}, which is part of the weights of OpenS2V-Eval and of ConsisID"
        load_weights(self._network, file, "CurricularFace's weights", remedy)

    @torch.inference_mode()
    def __call__(self, face: np.ndarray) -> np.ndarray:
        """(512,) float32 of an aligned face, (H, H, 3) uint8 RGB, which is resized to 112 px."""
        import cv2

        pixels = torch.from_numpy(cv2.resize(face, (112, 112))).permute(2, 0, 1)[None]
        return self._network(pixels / 127.5 - 1)[0].numpy()
