"""Every metric on numbers whose answer is known by hand."""

from __future__ import annotations

import numpy as np
import pytest

from mm_core.evaluation import metrics

GENERATOR = np.random.default_rng(0)
LANDMARKS = np.array([[30, 40], [60, 41], [45, 58], [34, 75], [57, 74]], np.float32)
NO_FACE = np.full((1, 5, 2), np.nan, np.float32)


def test_similarity_is_the_cosine_to_the_mean_of_the_normalised_references():
    references = np.array([[2.0, 0, 0], [0, 9.0, 0]])  # lengths must not matter
    frames = np.array([[5.0, 0, 0], [1, 1, 0], [0, 0, 3], [-1, -1, 0]])
    assert metrics.similarities(frames, references) == pytest.approx([np.sqrt(0.5), 1, 0, -1])


def test_a_copied_reference_scores_less_than_the_mean_face():
    references = GENERATOR.normal(size=(4, 64))
    copy, mean = metrics.similarities(np.stack([references[0], metrics.mean_direction(references)]), references)
    assert mean == pytest.approx(1)
    assert copy < 0.8


def test_centring_takes_the_shared_direction_out():
    shared, own, other = 10 * np.eye(3)
    references = np.stack([shared + own])
    frames = np.stack([shared + own, shared + other])
    centre = np.mean([f / np.linalg.norm(f) for f in frames], axis=0)
    assert metrics.similarities(frames, references) == pytest.approx([1, 0.5])
    assert metrics.similarities(frames, references, centre) == pytest.approx([1, -1])


def test_frames_without_a_face_stay_out_of_the_mean():
    frames = np.array([[1.0, 0], [np.nan, np.nan], [1, 0]])
    similarity = metrics.similarities(frames, np.array([[1.0, 0]]))
    assert np.isnan(similarity).tolist() == [False, True, False]
    assert metrics.mean_found(similarity) == pytest.approx(1)
    assert np.isnan(metrics.mean_found(np.full(3, np.nan)))
    assert np.isnan(metrics.largest_found(np.full(3, np.nan)))


@pytest.mark.parametrize("frames", (1, 2, 9, 49, 161))
def test_decay_of_a_constant_is_0(frames):
    assert metrics.decay(np.full(frames, 0.7)) == pytest.approx(0)


def test_decay_of_a_step_is_its_height_and_of_a_line_four_fifths():
    assert metrics.decay(np.repeat([0.9, 0.2], 24)) == pytest.approx(0.7)
    assert metrics.decay(np.linspace(1, 0, 97)) == pytest.approx(0.8, abs=0.003)  # 12/15 of the line
    assert metrics.decay(np.linspace(0, 1, 97)) < 0


def test_decay_leaves_lost_frames_out_and_is_nan_without_an_end():
    similarity = np.repeat([0.9, 0.2], 24)
    similarity[[0, 5, 46]] = np.nan
    assert metrics.decay(similarity) == pytest.approx(0.7)
    similarity[24:] = np.nan
    assert np.isnan(metrics.decay(similarity))


def test_samples_are_even_and_hold_both_ends():
    assert metrics.sample_evenly(49, 16)[[0, -1]].tolist() == [0, 48]
    assert metrics.sample_evenly(5, 16).tolist() == [0, 1, 2, 3, 4]


def test_fm_ref_ignores_place_size_and_stretching_with_the_picture():
    moved = 2.5 * LANDMARKS + np.float32([40, -12])
    squeezed = LANDMARKS * np.float32([3, 1])
    frames = np.concatenate([np.stack([LANDMARKS, moved]), NO_FACE])
    values = metrics.motion_to_reference(frames, (100, 100), LANDMARKS, (100, 100))
    assert values[:2] == pytest.approx([0, 0], abs=1e-6)
    assert np.isnan(values[2])
    in_a_wide_frame = metrics.motion_to_reference(squeezed[None], (300, 100), LANDMARKS, (100, 100))
    assert in_a_wide_frame == pytest.approx([0], abs=1e-6)


def test_fm_ref_of_one_pose_in_pictures_of_two_shapes_is_0_only_unsquared():
    assert metrics.motion_to_reference(LANDMARKS[None], (300, 100), LANDMARKS, (100, 100))[0] > 0.3
    assert metrics.motion_to_reference(LANDMARKS[None], (1, 1), LANDMARKS, (1, 1)) == pytest.approx([0], abs=1e-6)


def test_fm_ref_grows_with_tilt_up_to_2():
    centred = LANDMARKS - LANDMARKS.mean(axis=0)
    angles = np.radians([0, 10, 20, 40, 180])
    turns = np.stack([np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]]) for a in angles])
    tilted = np.einsum("fij,pj->fpi", turns, centred) + 50
    values = metrics.motion_to_reference(tilted, (100, 100), LANDMARKS, (100, 100))
    assert values == pytest.approx(2 * np.sin(angles / 2), abs=1e-6)


def test_motion_between_is_the_shift_and_never_bridges_a_gap():
    shifts = np.float32([[0, 0], [3, 4], [3, 4], [100, 0], [112, 5]])
    frames = LANDMARKS[None] + shifts[:, None]
    frames[2] = np.nan
    steps = metrics.motion_between(frames)
    assert steps[[0, 3]] == pytest.approx([5, 13], rel=1e-5)
    assert np.isnan(steps[1:3]).all()
    assert metrics.largest_found(steps) == pytest.approx(13, rel=1e-5)
    assert len(metrics.motion_between(frames[:1])) == 0


def test_flow_strength_is_of_the_fastest_pixels():
    flow = np.zeros((100, 100, 2))
    assert metrics.flow_strength(flow) == 0
    flow[:5] = (3, 4)  # a twentieth
    assert metrics.flow_strength(flow) == pytest.approx(5)


def test_dynamic_needs_a_quarter_of_the_frames_above_the_limit_at_the_clips_size():
    def clip(moving: int, pixels: float) -> np.ndarray:
        return np.array([pixels] * moving + [0.0] * (15 - moving))

    assert metrics.is_dynamic(clip(4, 6.1), (400, 256))
    assert not metrics.is_dynamic(clip(3, 6.1), (400, 256))
    assert not metrics.is_dynamic(clip(15, 6.1), (720, 480))
    assert metrics.is_dynamic(clip(15, 11.3), (720, 480))
    assert not metrics.is_dynamic(np.zeros(0), (256, 256))


def test_consistency_of_stillness_steady_motion_and_shaking():
    still, right = np.zeros((40, 60, 2)), np.zeros((40, 60, 2))
    right[..., 0] = 5
    assert metrics.flow_consistency(still, still) == 1
    assert metrics.flow_consistency(right, right) == 1
    assert metrics.flow_consistency(right, -right) == pytest.approx(0, abs=0.03)
    assert metrics.flow_consistency(right, still) == pytest.approx(0, abs=0.05)
    assert metrics.flow_consistency(right, 0.8 * right) == pytest.approx(0.89, abs=0.01)
    assert np.isnan(metrics.flow_consistency(right + 100, right))
