"""The best of several clips, made of photographs."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mm_core.errors import MagicMirrorError, SettingError
from mm_core.evaluation.best_of import best_of, centre_of, split_clips
from mm_core.evaluation.people import Person
from mm_core.evaluation.picture import HEIGHT, LEFT, WIDTH, draw
from mm_core.faces.analysis import FaceAnalyzer
from mm_core.faces.tracking import find_faces


@pytest.fixture(scope="module")
def clips(photos: dict[str, np.ndarray], texture: np.ndarray) -> np.ndarray:
    """Three of two frames: another person, the person, the person and then nobody."""
    height, width = photos["person_a_1"].shape[:2]
    nobody = texture[:height, :width]
    pictures = [*[photos["impostor_1"]] * 2, *[photos["person_a_1"]] * 2, photos["person_a_1"], nobody]
    return split_clips(np.stack(pictures), 3)


def test_the_right_person_wins(analyzer: FaceAnalyzer, person_a: Person, clips: np.ndarray) -> None:
    done: list[int] = []
    result = best_of(analyzer, clips, person_a.embeddings, threshold=0.25, on_frame=done.append)
    assert (result.best, result.passed) == (1, True)  # as alike as the third: of equal ones the first
    assert result.score > 0.6 and result.scores[0] < 0.2 and result.scores[2] == pytest.approx(result.score)
    assert np.isnan(result.similarity).tolist() == [[False, False], [False, False], [False, True]]
    assert done == [1, 2, 3, 4, 5, 6]
    report = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert [clip["frames_without_face"] for clip in report["clips"]] == [0, 0, 1]
    picture = draw(result, clips)
    assert picture.shape[1] == WIDTH and picture.dtype == np.uint8
    assert not (picture[HEIGHT + 10 : HEIGHT + 60, LEFT : LEFT + 60] == 255).all()  # a thumbnail


def test_a_clip_of_another_person_fails(analyzer: FaceAnalyzer, person_a: Person, clips: np.ndarray) -> None:
    result = best_of(analyzer, clips[:1], person_a.embeddings, threshold=0.25)
    assert not result.passed and "threshold 0.250" in result.summary and "NOT passed" in result.summary


def test_no_face_at_all(analyzer: FaceAnalyzer, person_a: Person, clips: np.ndarray) -> None:
    nobody = clips[2:, 1:]
    result = best_of(analyzer, nobody, person_a.embeddings, threshold=-1.0)
    assert (result.best, result.score, result.passed) == (0, -1.0, False)
    assert draw(result, nobody).shape[1] == WIDTH


def test_centred(analyzer: FaceAnalyzer, person_a: Person, clips: np.ndarray, photos: dict[str, np.ndarray]) -> None:
    others = [find_faces(analyzer, photos[name])[0].normed_embedding for name in ("impostor_1", "person_b_1")]
    centre = centre_of(analyzer, [photos["impostor_1"], photos["person_b_1"]])
    centred = best_of(analyzer, clips, person_a.embeddings, threshold=0.25, centre=centre)
    references = [e / np.linalg.norm(e) - np.mean(others, axis=0) for e in person_a.embeddings]
    mean = sum(e / np.linalg.norm(e) for e in references)
    frame = others[0] - np.mean(others, axis=0)
    assert centred.scores[0] == pytest.approx(frame @ mean / np.linalg.norm(frame) / np.linalg.norm(mean), abs=1e-3)
    with pytest.raises(MagicMirrorError, match="none of the 1 pictures"):
        centre_of(analyzer, [clips[2, 1]])


def test_mistakes(analyzer: FaceAnalyzer, person_a: Person, clips: np.ndarray) -> None:
    with pytest.raises(SettingError, match="6 frames are not 4 clips"):
        split_clips(clips.reshape(-1, *clips.shape[2:]), 4)
    with pytest.raises(SettingError, match=r"threshold is 1.5"):
        best_of(analyzer, clips, person_a.embeddings, threshold=1.5)
