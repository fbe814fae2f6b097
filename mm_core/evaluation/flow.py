"""Optical flow that needs no weights, by the DIS of OpenCV, reduced to two numbers as the frames come in.

VBench, by which the paper measures, has RAFT, so its numbers differ: see raft.py and docs/evaluation.md.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .metrics import flow_consistency, flow_strength

FlowFunction = Callable[[np.ndarray, np.ndarray], np.ndarray]  # as `optical_flow`

MIN_FLOW_SIDE = 16  # pixels: DIS compares patches of 8 px on at least two scales


class FlowMeter:
    """`add` the frames of one clip in order; `strengths` and `consistencies` grow by one as soon as they can.

    strengths: pixels, from the second frame on. consistencies: 0 to 1, from the third. See metrics.
    """

    def __init__(self, flow_between: FlowFunction | None = None) -> None:
        self._flow_between = flow_between or optical_flow
        self.strengths: list[float] = []
        self.consistencies: list[float] = []
        self._frame: np.ndarray | None = None
        self._flow: np.ndarray | None = None

    def add(self, frame: np.ndarray) -> None:
        """The next frame, (H, W, 3) uint8 RGB, of the same size as the ones before."""
        if self._frame is not None:
            flow = self._flow_between(self._frame, frame)
            self.strengths.append(flow_strength(flow))
            if self._flow is not None:
                self.consistencies.append(flow_consistency(self._flow, flow))
            self._flow = flow
        self._frame = frame


def optical_flow(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Where each pixel of the first frame went: (H, W, 2) float32, to the right and down, in pixels.

    first, second: (H, W, 3) uint8 of one size; frames that are too small count as still.
    """
    import cv2

    if min(first.shape[:2]) < MIN_FLOW_SIDE:
        return np.zeros((*first.shape[:2], 2), np.float32)
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in (first, second)]
    return cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM).calc(*grey, None)
