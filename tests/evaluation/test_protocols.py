"""Public protocols: OpenS2V-Eval's, written out plainly here, on the same frames; IPVG's layout; intervals."""

from __future__ import annotations

import hashlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from insightface.app import FaceAnalysis
from insightface.utils import face_align
from PIL import Image

from mm_core.errors import CheckpointError
from mm_core.evaluation import curricularface, metrics
from mm_core.evaluation.curricularface import CurricularFace, IResNet101
from mm_core.evaluation.opens2v import FaceSim, MotionAmplitude
from mm_core.evaluation.recognisers import SFaceJudge
from mm_core.evaluation.run import evaluate
from mm_core.faces.analysis import FaceAnalyzer
from mm_core.video import write_video

FLAT = np.full((320, 250, 3), 120, np.uint8)


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file like CurricularFace's published one, with random weights of fewer layers."""
    monkeypatch.setattr(curricularface, "_STAGES", ((64, 64, 1), (64, 128, 1), (128, 256, 1), (256, 512, 1)))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(IResNet101().state_dict(), tmp_path / "backbone.bin")
    return tmp_path / "backbone.bin"


def plain_facesim(app: FaceAnalysis, network: CurricularFace, picture: np.ndarray, frames: list[np.ndarray]) -> tuple:
    """The protocol, step by step: arc and cur."""

    def describe(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        bgr, border = cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), (0, 0)
        faces = app.get(bgr)
        if not faces:
            top, left = int(bgr.shape[0] * 0.25), int(bgr.shape[1] * 0.25)
            grey = cv2.copyMakeBorder(bgr, top, top, left, left, cv2.BORDER_CONSTANT, value=(128, 128, 128))
            faces, border = app.get(grey), (left, top)
        if not faces:
            return None
        face = sorted(faces, key=lambda f: (f.bbox[2] - f.bbox[0]) * (f.bbox[3] - f.bbox[1]))[-1]
        crop = face_align.norm_crop(bgr, landmark=face.kps - np.array(border), image_size=224)
        return face.embedding, network(cv2.cvtColor(crop, cv2.COLOR_BGR2RGB))

    given, arcs, curs = describe(picture), [], []
    described = [describe(frame) for frame in frames]
    for index in np.linspace(0, len(frames) - 1, 32, dtype=int):
        face = described[index]
        if face is not None:
            arc, cur = (float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) for a, b in zip(given, face))
            arcs.append(max(0.0, arc))
            curs += [cur] if cur > 0 else []
    return (float(np.mean(arcs)) if arcs else 0.0), (float(np.mean(curs)) if curs else 0.0)


def test_facesim_is_the_protocol(
    analyzer: FaceAnalyzer, insightface_root: Path, photographs: Path, photos: dict[str, np.ndarray], weights: Path
) -> None:
    app = FaceAnalysis(name=str(insightface_root / "models" / "buffalo_sc"), providers=["CPUExecutionProvider"])
    app.prepare(ctx_id=0, det_size=(320, 320))
    tight = photos["person_a_1"][60:230, 40:210]  # found with a border only
    frames = [photos["person_a_2"], tight, FLAT, photos["person_b_1"]]
    picture = photographs / "person_a_1.jpg"
    measured = FaceSim(analyzer, weights)(picture, iter(frames), len(frames))
    plain = plain_facesim(app, CurricularFace(weights), np.array(Image.open(picture).convert("RGB")), frames)
    assert measured == pytest.approx(plain, abs=1e-6)
    assert 0.3 < measured[0] < 0.8  # she is in two of the three faces


def test_curricularface_has_the_published_names_and_sizes(tmp_path: Path) -> None:
    with torch.device("meta"):
        tensors = IResNet101().state_dict()
    names = "".join(f"{key} {tuple(tensor.shape)}\n" for key, tensor in sorted(tensors.items()))
    assert hashlib.sha256(names.encode()).hexdigest().startswith("1a0fcd7e1f9e28db")  # of OpenS2V-Eval's own network
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.bin")
    for file in ("other.bin", "nowhere.bin"):
        with pytest.raises(CheckpointError, match=rf"{file} does not hold CurricularFace.*glint360k"):
            CurricularFace(tmp_path / file)


def test_a_folder_without_faces_one_frame_and_mixed_sizes(
    tmp_path: Path, analyzer: FaceAnalyzer, photographs: Path, photos: dict[str, np.ndarray]
) -> None:
    small = np.array(Image.fromarray(photos["person_a_2"]).resize((128, 160)))
    clips = {"nobody": [FLAT] * 3, "one": [photos["person_a_2"]], "small": [small, small]}
    for name, frames in clips.items():
        write_video(tmp_path / name / f"person_{name}.mp4", np.stack(frames), 8)
    (tmp_path / "references").mkdir()
    (tmp_path / "references" / "person.jpg").write_bytes((photographs / "person_a_1.jpg").read_bytes())
    measured = {
        name: evaluate(
            analyzer, tmp_path / name, tmp_path / "references", threshold=0.25,
            judges=[SFaceJudge()], facesim=FaceSim(analyzer),
        )
        for name in clips
    }  # fmt: skip
    nobody = measured["nobody"].summary
    assert (nobody.means["facesim_arc"], nobody.face_rate, nobody.success_identity) == (0, 0, 0)
    assert np.isnan([nobody.means[name] for name in ("id_similarity", "id_similarity_sface", "success_yaw_20")]).all()
    assert nobody.measured["facesim_cur"] == 0 and np.isnan(nobody.intervals["facesim_arc"]).all()  # one person
    for name in ("one", "small"):
        scores = measured[name].clips[0].scores
        assert min(scores.facesim_arc, scores.id_similarity_sface) > 0.4 and scores.success_yaw_20 == 1
        assert np.isnan(scores.success_yaw_beyond)
    assert np.isnan(measured["one"].clips[0].scores.motion_amplitude)


def test_success_by_yaw() -> None:
    similarity = np.array([0.9, 0.1, np.nan, 0.9, 0.9, 0.1, 0.25])
    yaws = np.array([0, -19.9, np.nan, 20, -44, 45, -90])
    assert metrics.success_by_yaw(similarity, yaws, 0.25) == (0.5, 1, 0.5)
    assert np.isnan(metrics.success_by_yaw(similarity[:3], yaws[:3], 0.25)).tolist() == [False, True, True]


def test_intervals_are_over_people_not_clips() -> None:
    values, people = np.array([0.0] * 9 + [1.0] * 9), ["a"] * 9 + ["b"] * 9
    assert metrics.bootstrap(values, people) == (0, 1)  # two people, however many clips
    assert np.isnan(metrics.bootstrap(values, ["a"] * 18)).all()
    values = np.random.default_rng(1).normal(size=400)
    people = [str(number) for number in range(400)]
    low, high = metrics.bootstrap(values, people)
    assert (low, high) == metrics.bootstrap(values, people)  # the same draws
    normal = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - normal, values.mean() + normal), abs=0.02)
    lost = np.concatenate([values, [np.nan] * 50])
    assert metrics.bootstrap(lost, [*people, *["lost"] * 50]) == (low, high)


def test_motion_amplitude_is_the_mean_flow(texture: np.ndarray) -> None:
    amplitude = MotionAmplitude()
    for step in range(3):
        amplitude.add(np.ascontiguousarray(texture[40:360, 60 - 4 * step : 460 - 4 * step]))
    assert amplitude.value == pytest.approx(2, abs=0.3)  # 4 px to the right, none down
