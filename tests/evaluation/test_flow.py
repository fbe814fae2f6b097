"""Real optical flow of a texture that is moved by known amounts."""

from __future__ import annotations

import numpy as np
import pytest

from mm_core.evaluation.flow import FlowMeter, optical_flow
from mm_core.evaluation.metrics import is_dynamic

SIZE = (320, 256)  # width, height


def window(texture: np.ndarray, x: int, y: int) -> np.ndarray:
    return texture[y : y + SIZE[1], x : x + SIZE[0]]


def measured(frames: list[np.ndarray]) -> FlowMeter:
    meter = FlowMeter()
    for frame in frames:
        meter.add(frame)
    return meter


def test_a_still_clip_is_smooth_and_not_dynamic(texture):
    meter = measured([window(texture, 50, 50)] * 4)
    assert meter.strengths == [0, 0, 0]
    assert meter.consistencies == [1, 1]
    assert not is_dynamic(np.array(meter.strengths), SIZE)


@pytest.mark.parametrize(("x", "y"), ((3, 0), (0, -5), (6, 4)))
def test_a_translated_texture_gives_its_flow(texture, x, y):
    flow = optical_flow(window(texture, 60, 60), window(texture, 60 - x, 60 - y))
    assert np.median(flow.reshape(-1, 2), axis=0) == pytest.approx([x, y], abs=0.1)


def test_steady_motion_is_smooth_and_dynamic(texture):
    meter = measured([window(texture, 10 * index, 50) for index in range(8)])
    assert np.mean(meter.strengths) == pytest.approx(10, rel=0.1)
    assert np.mean(meter.consistencies) > 0.95
    assert is_dynamic(np.array(meter.strengths), SIZE)


def test_shaking_is_not_smooth(texture):
    meter = measured([window(texture, 60 + 8 * (index % 2), 50) for index in range(6)])
    assert np.mean(meter.consistencies) < 0.1


def test_no_frames_and_tiny_frames():
    assert measured([]).strengths == []
    tiny = measured([np.zeros((8, 8, 3), np.uint8)] * 3)
    assert (len(tiny.strengths), len(tiny.consistencies)) == (2, 1)
