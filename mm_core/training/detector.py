"""A face detector that gradients can pass through: where eyes, nose and mouth are in decoded frames, for `pose_loss`.

The network is that of the face pack (SCRFD), the same whose landmarks the features hold.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CheckpointError
from .onnx_network import load_network, shape_of

if TYPE_CHECKING:
    from onnx import ModelProto

STRIDES = (8, 16, 32)  # pixels between the places where each head of the network looks for faces
ANCHORS = 2  # guesses at each place
SMALLEST, LARGEST = 192, 640  # pixels: frames whose shorter side is outside are scaled for it
PIXEL_MEAN, PIXEL_SCALE = 127.5, 128.0  # of 0..255
GOOD = 0.5  # of the best guess's score: guesses from there on are averaged


class DifferentiableDetector(nn.Module):
    """The detector of an insightface pack, such as `det_10g`, as a frozen torch module in float32.

    path: the detection model of a pack, in the format of onnx.

    Raises CheckpointError where the file is missing, damaged or no such detector, MagicMirrorError where onnx2torch
    cannot be imported.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.network, _ = load_network(path, "face detector", "det_10g.onnx of buffalo_l", _check_detector)
        self.requires_grad_(False).eval()

    def forward(self, frames: Tensor, near: Tensor) -> Tensor:
        """The landmarks of one face in each frame, (B, 5, 2) in pixels, pixel centres at whole numbers.

        Gradients reach the frames through the landmarks. Which guesses they are made of is a constant.

        Args:
            frames: (B, 3, H, W) RGB, 0 to 1.
            near: (B, 5, 2), landmarks of the wanted person about there.
        """
        with torch.autocast(frames.device.type, enabled=False):
            # One by one: some packs fix the batch's size to 1.
            return torch.stack([self._landmarks(*one) for one in zip(frames.float()[:, None], near)])

    def _landmarks(self, frame: Tensor, near: Tensor) -> Tensor:
        """(1, 3, H, W) and (5, 2) -> (5, 2)."""
        side = min(frame.shape[-2:])
        scale = min(max(side, SMALLEST), LARGEST) / side
        if scale != 1:
            frame = F.interpolate(frame, scale_factor=scale, mode="bicubic", antialias=scale < 1)
        height, width = frame.shape[-2:]
        frame = F.pad(frame, (0, -width % STRIDES[-1], 0, -height % STRIDES[-1]))
        outputs = self.network((frame * 255 - PIXEL_MEAN) / PIXEL_SCALE)
        heads = len(STRIDES)
        scores = torch.cat([score.reshape(-1) for score in outputs[:heads]]).detach()
        guesses = torch.cat([
            _places(frame, stride)[:, None] + stride * offsets.reshape(-1, 5, 2)
            for stride, offsets in zip(STRIDES, outputs[2 * heads :])
        ])  # fmt: skip
        guesses = (guesses + 0.5) / scale - 0.5  # (G, 5, 2)
        away = (guesses.detach().mean(dim=1) - near.mean(dim=0)).square().sum(dim=-1)
        scores = scores * torch.exp(-away / (2 * _spread(near)))  # other people in the frame are not meant
        weights = torch.where(scores >= GOOD * scores.max(), scores, 0)
        return torch.einsum("g,gpx->px", weights / weights.sum(), guesses)


def _places(frame: Tensor, stride: int) -> Tensor:
    """Where a head looks, row by row, (H / stride * W / stride * ANCHORS, 2) x y in pixels."""
    steps = (torch.arange(0, size, stride, device=frame.device) for size in frame.shape[-2:])
    y, x = torch.meshgrid(*steps, indexing="ij")
    return torch.stack([x, y], dim=-1).reshape(-1, 2).repeat_interleave(ANCHORS, dim=0)


def _spread(landmarks: Tensor) -> Tensor:
    """Mean squared distance of landmarks, (..., 5, 2), from their centre."""
    return (landmarks - landmarks.mean(dim=-2, keepdim=True)).square().sum(dim=-1).mean(dim=-1)


def _check_detector(model: ModelProto, path: Path) -> None:
    """Raise CheckpointError unless there are scores, boxes and five landmarks at each of the strides."""
    found = [shape_of(value)[-1:] for value in model.graph.output]
    wanted = [[size] for size in (1, 4, 10) for _ in STRIDES]
    if found != wanted:
        raise CheckpointError(
            f"{path} is no face detector with landmarks at strides of {STRIDES} px: its outputs end in {found}, not "
            f"{wanted}. Give the detection file of a pack, such as det_10g.onnx of buffalo_l"
        )
