"""The differentiable recogniser against onnxruntime and the alignment against cv2, on real portraits."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from insightface.model_zoo.arcface_onnx import ArcFaceONNX
from insightface.utils import face_align
from onnx import TensorProto, helper, numpy_helper

from mm_core.errors import CheckpointError, MagicMirrorError
from mm_core.faces.arcface import ALIGNED_SIZE, DifferentiableArcFace, align_faces

# Of 0..1, between crops in floating point. Releases of OpenCV that round the bilinear weights differ by far more.
MEAN_ERROR, LARGEST_ERROR = 0.01 / 255, 0.1 / 255


def insightface_crop(image: np.ndarray, landmarks: np.ndarray) -> torch.Tensor:
    """(1, 3, 112, 112), 0..1, by insightface's own alignment."""
    crop = face_align.norm_crop(image, landmarks, ALIGNED_SIZE)
    return torch.from_numpy(crop).permute(2, 0, 1)[None] / 255


def onnx_recogniser(path: Path, *, normalises_itself: bool) -> Path:
    """Write a small network of random weights with an ArcFace's inputs, outputs and kinds of layers."""
    random = np.random.default_rng(0)
    weights = {
        "mean": np.float32(127.5),
        "scale": np.float32(1 / 127.5),
        "kernel": random.normal(size=(4, 3, 16, 16)).astype(np.float32),
        "slope": random.uniform(size=(4, 1, 1)).astype(np.float32),
        "gain": random.uniform(1, 2, size=4).astype(np.float32),
        "bias": random.normal(size=4).astype(np.float32),
        "running_mean": random.normal(size=4).astype(np.float32),
        "running_var": random.uniform(1, 2, size=4).astype(np.float32),
        "matrix": random.normal(size=(512, 196)).astype(np.float32),
        "offset": random.normal(size=512).astype(np.float32),
    }
    own = [
        helper.make_node("Sub", ["pixels", "mean"], ["centred"], name="Sub_0"),
        helper.make_node("Mul", ["centred", "scale"], ["scaled"], name="Mul_1"),
    ]
    statistics = ["gain", "bias", "running_mean", "running_var"]
    nodes = [
        helper.make_node("Conv", ["scaled" if normalises_itself else "pixels", "kernel"], ["a"], "c", strides=[16, 16]),
        helper.make_node("BatchNormalization", ["a", *statistics], ["b"], "n"),
        helper.make_node("PRelu", ["b", "slope"], ["d"], "p"),
        helper.make_node("Flatten", ["d"], ["e"], "f"),
        helper.make_node("Gemm", ["e", "matrix", "offset"], ["embedding"], "g", transB=1),
    ]
    graph = helper.make_graph(
        own * normalises_itself + nodes,
        "recogniser",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["batch", 3, ALIGNED_SIZE, ALIGNED_SIZE])],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", 512])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)], ir_version=6), str(path))
    return path


def test_embedding_of_insightfaces_crop_is_insightfaces(recogniser, portraits) -> None:
    for portrait in portraits.values():
        embedding = recogniser(insightface_crop(portrait.image, portrait.face.landmarks))
        torch.testing.assert_close(embedding, portrait.embedding, rtol=1e-4, atol=1e-4)


def test_embedding_through_our_alignment_is_insightfaces(recogniser, portraits) -> None:
    for portrait in portraits.values():
        embedding = recogniser(align_faces(portrait.frame, portrait.landmarks))
        assert F.cosine_similarity(embedding, portrait.embedding) > 0.9998


def test_channels_are_rgb(recogniser, portraits) -> None:
    """Swapped channels still look alike to the recogniser, 0.89 to 0.96 here: only the exact embedding tells."""
    for portrait in (portraits["person_a_1"], portraits["person_b_2"]):
        crop = insightface_crop(portrait.image, portrait.face.landmarks)
        right, swapped = (F.cosine_similarity(recogniser(faces), portrait.embedding) for faces in (crop, crop.flip(1)))
        assert right > 0.99999
        assert swapped < 0.97


def test_a_batch_is_its_faces_one_by_one(recogniser, portraits) -> None:
    faces = torch.cat([align_faces(p.frame, p.landmarks) for p in (portraits["person_a_1"], portraits["person_b_1"])])
    torch.testing.assert_close(recogniser(faces), torch.cat([recogniser(face[None]) for face in faces]))


@pytest.mark.parametrize("size", [ALIGNED_SIZE, 2 * ALIGNED_SIZE])
def test_alignment_is_insightfaces(portraits, size: int) -> None:
    for portrait in portraits.values():
        crop = face_align.norm_crop(portrait.image.astype(np.float32) / 255, portrait.face.landmarks, size)
        error = (align_faces(portrait.frame, portrait.landmarks, size)[0].permute(1, 2, 0) - torch.tensor(crop)).abs()
        assert error.mean() < MEAN_ERROR
        assert error.max() < LARGEST_ERROR


def test_alignment_turns_and_is_black_outside_like_insightfaces(portraits) -> None:
    """The face half outside the picture, turned by 40 degrees and 30% smaller."""
    portrait = portraits["person_a_1"]
    c, s = 0.7 * np.cos(np.radians(40)), 0.7 * np.sin(np.radians(40))
    landmarks = (portrait.face.landmarks - portrait.face.landmarks.mean(axis=0)) @ np.array([[c, s], [-s, c]])
    landmarks = (landmarks + np.array([0, 40])).astype(np.float32)
    crop = torch.tensor(face_align.norm_crop(portrait.image.astype(np.float32) / 255, landmarks, ALIGNED_SIZE))
    ours = align_faces(portrait.frame, torch.tensor(landmarks)[None])[0].permute(1, 2, 0)
    assert (crop == 0).all(dim=-1).float().mean() > 0.3
    assert (ours - crop).abs().mean() < MEAN_ERROR
    assert (ours - crop).abs().max() < LARGEST_ERROR


def test_alignment_passes_gradients_to_frames_and_not_to_landmarks() -> None:
    torch.manual_seed(0)
    frames = torch.rand(2, 1, 9, 7, dtype=torch.float64, requires_grad=True)
    landmarks = torch.rand(2, 5, 2, dtype=torch.float64) * 6
    landmarks.requires_grad_()
    assert torch.autograd.gradcheck(lambda pixels: align_faces(pixels, landmarks, 14), frames)
    align_faces(frames, landmarks, 14).sum().backward()
    assert landmarks.grad is None


def test_alignment_of_half_precision_frames_is_done_in_float32(portraits) -> None:
    portrait = portraits["person_b_1"]
    frame = portrait.frame.bfloat16()
    aligned = align_faces(frame, portrait.landmarks)
    assert aligned.dtype == torch.float32
    assert torch.equal(aligned, align_faces(frame.float(), portrait.landmarks))


def test_parameters_are_frozen_and_get_no_gradient(recogniser_file: Path) -> None:
    recogniser = DifferentiableArcFace(recogniser_file)
    faces = torch.rand(1, 3, ALIGNED_SIZE, ALIGNED_SIZE, requires_grad=True)
    recogniser(faces).sum().backward()
    assert faces.grad.abs().max() > 0
    assert list(recogniser.parameters())
    assert not any(p.requires_grad or p.grad is not None for p in recogniser.parameters())


def test_training_mode_does_not_touch_the_statistics(recogniser_file: Path) -> None:
    """A loop calls `train()` on everything; the batch norms would overwrite their statistics in one pass."""
    recogniser = DifferentiableArcFace(recogniser_file)
    faces = torch.rand(2, 3, ALIGNED_SIZE, ALIGNED_SIZE)
    before, buffers = recogniser(faces), {name: b.clone() for name, b in recogniser.named_buffers()}
    torch.nn.ModuleList([recogniser]).train()
    assert not any(module.training for module in recogniser.modules())
    assert torch.equal(recogniser(faces), before)
    assert all(torch.equal(b, buffers[name]) for name, b in recogniser.named_buffers())


def test_autocast_does_not_reach_the_recogniser(recogniser, portraits) -> None:
    portrait = portraits["person_a_1"]
    expected = recogniser(align_faces(portrait.frame, portrait.landmarks))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(recogniser(align_faces(portrait.frame, portrait.landmarks)), expected)


@pytest.mark.parametrize("normalises_itself", [True, False])
def test_normalisation_is_chosen_as_insightface_does(tmp_path: Path, portraits, normalises_itself: bool) -> None:
    path = onnx_recogniser(tmp_path / "recogniser.onnx", normalises_itself=normalises_itself)
    theirs, ours = ArcFaceONNX(str(path)), DifferentiableArcFace(path)
    assert theirs.input_mean == ours.mean == (0.0 if normalises_itself else 127.5)
    portrait = portraits["impostor_1"]
    crop = insightface_crop(portrait.image, portrait.face.landmarks)
    bgr = (crop[0].flip(0).permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    torch.testing.assert_close(ours(crop), torch.from_numpy(theirs.get_feat(bgr)), rtol=1e-4, atol=1e-3)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"w600k_r50\.onnx is missing"):
        DifferentiableArcFace(tmp_path / "w600k_r50.onnx")


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "w600k_r50.onnx").write_bytes(b"<html>not found</html>")
    with pytest.raises(CheckpointError, match="download its pack again"):
        DifferentiableArcFace(tmp_path / "w600k_r50.onnx")


def test_a_detector_is_refused(recogniser_file: Path) -> None:
    with pytest.raises(CheckpointError, match="is no ArcFace recogniser"):
        DifferentiableArcFace(recogniser_file.with_name("scrfd_500m_bnkps.onnx"))


def test_without_onnx2torch_the_error_says_what_to_install(recogniser_file: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx2torch", None)
    with pytest.raises(MagicMirrorError, match="pip install onnx2torch"):
        DifferentiableArcFace(recogniser_file)


def test_a_torchvision_for_another_torch_is_named(recogniser_file: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "onnx2torch.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "onnx2torch", raising=False)
    with pytest.raises(MagicMirrorError, match=r"torchvision::nms does not exist.*belongs to the installed torch"):
        DifferentiableArcFace(recogniser_file)


def test_faces_that_are_not_aligned_are_refused(recogniser, portraits) -> None:
    with pytest.raises(ValueError, match="use align_faces"):
        recogniser(portraits["person_a_1"].frame)


def test_landmarks_that_are_no_face_are_refused() -> None:
    frames, landmarks = torch.rand(2, 3, 64, 64), torch.rand(2, 5, 2) * 60
    for bad in (float("nan"), 7.0):
        landmarks[1] = bad
        with pytest.raises(ValueError, match="drop frames without a real face"):
            align_faces(frames, landmarks)
    with pytest.raises(ValueError, match="one face for each frame"):
        align_faces(frames, landmarks[:1])
