"""Real SCRFD and ArcFace models on real photographs of four people: person_a and person_b twice, two others once."""

import functools
import operator
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image, ImageColor, ImageFilter

from mm_core.errors import CheckpointError, FaceChoiceError, MagicMirrorError, NoFaceError, SettingError
from mm_core.faces.analysis import Face, FaceAnalyzer, estimate_pose, select_face, shared_analyzer
from mm_core.faces.crop import square_crop, whole_image
from mm_core.faces.drawing import TAKEN, draw_faces
from mm_core.faces.references import (
    MIN_SHARPNESS,
    analyse_references,
    look_at,
    references_from,
    with_faces,
)
from mm_core.picture_file import read_image

PACK = "buffalo_sc"
PHOTOS = ("person_a_1", "person_a_2", "person_b_1", "person_b_2", "impostor_1", "impostor_2")
BLANK = np.full((480, 640, 3), 90, np.uint8)

cached_analyzer = functools.cache(FaceAnalyzer)


@pytest.fixture
def analyzer(insightface_root: Path) -> FaceAnalyzer:
    return cached_analyzer(insightface_root, PACK)


@pytest.fixture
def photos(photographs: Path) -> dict[str, np.ndarray]:
    return {name: read_image(photographs / f"{name}.jpg") for name in PHOTOS}


def only(faces: list[Face]) -> Face:
    assert len(faces) == 1
    return faces[0]


def cosine(one: Face, other: Face) -> float:
    return float(one.normed_embedding @ other.normed_embedding)


def resized(image: np.ndarray, factor: float) -> np.ndarray:
    size = (round(image.shape[1] * factor), round(image.shape[0] * factor))
    return np.array(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))


def side_by_side(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    canvas = np.full((max(left.shape[0], right.shape[0]), left.shape[1] + right.shape[1], 3), 128, np.uint8)
    canvas[: left.shape[0], : left.shape[1]] = left
    canvas[: right.shape[0], left.shape[1] :] = right
    return canvas


def rotation(yaw: float, pitch: float, roll: float) -> np.ndarray:
    """Roll after yaw after pitch, degrees, x right, y down, z towards the viewer: insightface's convention."""
    (sy, sp, sr), (cy, cp, cr) = np.sin(np.radians([yaw, pitch, roll])), np.cos(np.radians([yaw, pitch, roll]))
    about_x = np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_z = np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])
    return about_z @ about_y @ about_x


def copy_pack(insightface_root: Path, folder: Path, *wanted: str) -> None:
    folder.mkdir(parents=True)
    for model in (insightface_root / "models" / PACK).glob("*.onnx"):
        if not wanted or any(part in model.name for part in wanted):
            shutil.copy(model, folder)


def test_same_person_is_closer_than_any_other(analyzer, photos):
    faces = {name: only(analyzer.detect(image)) for name, image in photos.items()}
    for name, face in faces.items():
        for other_name, other in faces.items():
            if name < other_name:
                same = name[:8] == other_name[:8] and name.startswith("person")
                assert (cosine(face, other) > 0.5) == same, (name, other_name)
                assert same or cosine(face, other) < 0.2


def test_embedding_is_insightfaces_own_on_bgr(analyzer, photos, insightface_root):
    from insightface.app import FaceAnalysis

    folder = str(insightface_root / "models" / PACK)
    app = FaceAnalysis(name=folder, providers=["CPUExecutionProvider"])
    app.prepare(ctx_id=0, det_size=(640, 640))
    rgb = photos["person_a_2"]
    face, direct = only(analyzer.detect(rgb)), app.get(np.ascontiguousarray(rgb[..., ::-1]))[0]
    np.testing.assert_array_equal(face.embedding, direct.embedding)
    np.testing.assert_array_equal(face.box, direct.bbox)
    assert face.embedding.shape == (512,) and np.linalg.norm(face.embedding) > 5  # not normalised
    assert np.abs(face.embedding - app.get(rgb)[0].embedding).max() > 1e-2  # the channel order does matter here


def test_found_without_being_recognised(analyzer: FaceAnalyzer, photos: dict[str, np.ndarray]) -> None:
    """Asked only where faces are, the analyzer finds the same ones in the same places."""
    for image in photos.values():
        face, found = only(analyzer.detect(image)), only(analyzer.detect(image, recognise=False))
        assert np.array_equal(found.box, face.box) and np.array_equal(found.landmarks, face.landmarks)
        assert (found.score, found.size, found.sharpness) == (face.score, face.size, face.sharpness)
        assert found.embedding.shape == (0,)


def test_faces_come_left_to_right_and_are_picked_by_name_or_index(analyzer, photos):
    a, b = photos["person_a_2"], resized(photos["person_b_1"], 0.5)
    alone_a, alone_b = only(analyzer.detect(a)), only(analyzer.detect(b))
    for image, order in ((side_by_side(a, b), (alone_a, alone_b)), (side_by_side(b, a), (alone_b, alone_a))):
        faces = analyzer.detect(image)
        assert [cosine(face, alone) > 0.8 for face, alone in zip(faces, order, strict=True)] == [True, True]
        assert select_face(faces, "leftmost") is select_face(faces, 0) is faces[0]
        assert select_face(faces, "rightmost") is select_face(faces, 1) is faces[1]
        assert cosine(select_face(faces, "largest"), alone_a) > 0.8
        with pytest.raises(FaceChoiceError, match=r"face 2 .*2 found"):
            select_face(faces, 2)
        for wrong in (-1, "smallest"):
            with pytest.raises(FaceChoiceError, match="largest"):
                select_face(faces, wrong)
    with pytest.raises(NoFaceError):
        select_face([], "largest")


@pytest.mark.parametrize("name", PHOTOS)
@pytest.mark.parametrize("margin", [0.0, 0.1])
def test_tight_crop_is_found_in_its_own_coordinates(analyzer, photos, name, margin):
    image = photos[name]
    whole = only(analyzer.detect(image))
    x0, y0, x1, y1 = (round(float(v)) for v in whole.box)
    dx, dy = round(margin * (x1 - x0)), round(margin * (y1 - y0))
    tight = only(analyzer.detect(image[y0 - dy : y1 + dy, x0 - dx : x1 + dx]))
    assert cosine(tight, whole) > 0.85
    assert np.abs(tight.landmarks + np.float32([x0 - dx, y0 - dy]) - whole.landmarks).max() < 0.08 * whole.size
    assert np.abs(tight.box + np.float32([x0 - dx, y0 - dy] * 2) - whole.box).max() < 0.15 * whole.size


def test_picture_without_face_or_of_the_wrong_type(analyzer):
    assert analyzer.detect(BLANK) == []
    with pytest.raises(ValueError, match="float32"):
        analyzer.detect(BLANK.astype(np.float32))


def test_pack_one_folder_too_deep(insightface_root, photos, tmp_path):
    copy_pack(insightface_root, tmp_path / "models" / "antelopev2" / "antelopev2")
    assert len(FaceAnalyzer(tmp_path, "antelopev2").detect(photos["person_a_1"])) == 1


def test_missing_incomplete_and_damaged_packs(insightface_root, tmp_path):
    models = tmp_path / "models"
    with pytest.raises(CheckpointError, match=r"models.buffalo_l must hold .*deepinsight.*non-commercial"):
        FaceAnalyzer(tmp_path)
    copy_pack(insightface_root, models / "detector", "scrfd")
    with pytest.raises(CheckpointError, match="lack recognition, found only detection"):
        FaceAnalyzer(tmp_path, "detector")
    copy_pack(insightface_root, models / "recogniser", "w600k")
    with pytest.raises(CheckpointError, match=r"recogniser.*no detection model"):
        FaceAnalyzer(tmp_path, "recogniser")
    copy_pack(insightface_root, models / "damaged")
    cut = next((models / "damaged").glob("w600k*"))
    cut.write_bytes(cut.read_bytes()[:100_000])
    with pytest.raises(CheckpointError, match=r"damaged.*Download the pack again"):
        FaceAnalyzer(tmp_path, "damaged")


def test_device(insightface_root):
    assert FaceAnalyzer(insightface_root, PACK, device="cpu").device == "cpu"
    with pytest.raises(SettingError, match="'gpu'"):
        FaceAnalyzer(insightface_root, PACK, device="gpu")


def test_two_packs_in_turn_are_read_once(insightface_root, tmp_path):
    for pack in ("one", "two"):
        copy_pack(insightface_root, tmp_path / "models" / pack)
    first, second = ([shared_analyzer(tmp_path, pack, "cpu") for pack in ("one", "two")] for _ in range(2))
    assert all(map(operator.is_, first, second)) and first[0] is not first[1]


def test_loading_is_silent(insightface_root, monkeypatch, capfd):
    from insightface.app import FaceAnalysis

    prepare = FaceAnalysis.prepare
    monkeypatch.setattr(FaceAnalysis, "prepare", lambda self, **options: (print("det-size"), prepare(self, **options)))
    FaceAnalyzer(insightface_root, PACK)
    assert capfd.readouterr().out == ""


def test_without_insightface(insightface_root, monkeypatch):
    monkeypatch.setitem(sys.modules, "insightface.app", None)
    with pytest.raises(MagicMirrorError, match="pip install insightface onnxruntime"):
        FaceAnalyzer(insightface_root, PACK)


def test_import_is_light():
    heavy = "{'torch', 'insightface', 'onnxruntime', 'cv2', 'comfy'}"
    code = f"import sys, mm_core.faces.references; print(sorted({heavy} & set(sys.modules)))"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True).stdout == "[]\n"


@pytest.mark.parametrize("angles", [(0, 0, 0), (35, 0, 0), (0, 20, 0), (0, 0, -25), (-30, -15, 40)])
def test_pose_of_the_mean_face(angles):
    from insightface.utils.transform import matrix2angle

    from mm_core.faces.analysis import _MEAN_LANDMARKS

    turned = _MEAN_LANDMARKS @ rotation(*angles).T
    np.testing.assert_allclose(estimate_pose(turned[:, :2] * 80 + 300), angles, atol=1e-6)
    pitch, yaw, roll = matrix2angle(rotation(*angles))
    np.testing.assert_allclose((yaw, pitch, roll), angles, atol=1e-6)  # insightface means the same by its angles


def test_mirrored_photo_has_the_opposite_yaw(analyzer, photos):
    image = photos["person_a_2"]  # he looks to the picture's left
    face, mirrored = only(analyzer.detect(image)), only(analyzer.detect(image[:, ::-1]))
    assert face.yaw < -8 and abs(face.yaw + mirrored.yaw) < 4
    for name in PHOTOS:  # all of them more or less facing the camera
        face = only(analyzer.detect(photos[name]))
        assert abs(face.yaw) < 20 and abs(face.pitch) < 30 and abs(face.roll) < 12


def test_pose_comes_from_the_3d_landmark_model_where_the_pack_has_one(insightface_root, photos, tmp_path):
    from insightface.data import get_object

    folder = tmp_path / "models" / "with_pose"
    copy_pack(insightface_root, folder)
    points = np.zeros((1103, 3), np.float32)
    points[-68:] = get_object("meanshape_68.pkl") @ rotation(50, -10, 15).T
    answer = onnx.numpy_helper.from_array(points.reshape(1, 3309), "answer")
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Constant", [], ["out"], value=answer)],
        "always_the_same_head",
        [onnx.helper.make_tensor_value_info("data", onnx.TensorProto.FLOAT, [1, 3, 192, 192])],
        [onnx.helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, [1, 3309])],
    )
    model = onnx.helper.make_model(graph, ir_version=8, opset_imports=[onnx.helper.make_opsetid("", 13)])
    onnx.save(model, folder / "1k3d68.onnx")
    analyzer = FaceAnalyzer(tmp_path, "with_pose")
    face = only(analyzer.detect(photos["person_a_1"]))
    np.testing.assert_allclose((face.yaw, face.pitch, face.roll), (50, -10, 15), atol=0.1)
    assert "turned away (yaw 50" in str(analyse_references(analyzer, [photos["person_a_1"]])[0].report)


def test_blur_and_smallness_are_warned_of(analyzer, photos):
    sharp = photos["person_a_2"]
    blurred = np.array(Image.fromarray(sharp).filter(ImageFilter.GaussianBlur(8)))  # 2% of the face
    x0, y0, x1, y1 = (round(float(v)) for v in only(analyzer.detect(sharp)).box)
    tight = blurred[y0:y1, x0:x1]  # the crop's rim must not pass for sharpness
    small = resized(sharp, 0.15)
    reports = [r.report for r in analyse_references(analyzer, [sharp, blurred, tight, small])]
    assert [[word in str(report) for word in ("blurred", "px across; use")] for report in reports] == [
        [False, False],
        [True, False],
        [True, False],
        [False, True],
    ]
    at_112 = only(analyzer.detect(resized(sharp, 112 / reports[0].size)))
    assert reports[0].sharpness < 2.5 * at_112.sharpness  # pixels do not make a face sharper than it is shown
    assert reports[0].warnings == () and reports[0].sharpness > 10 * MIN_SHARPNESS > 10 * reports[1].sharpness


def test_references(analyzer, photos):
    both = side_by_side(photos["person_a_2"], resized(photos["person_b_1"], 0.5))
    first, second = analyse_references(analyzer, [photos["person_a_1"], both], names=["old.jpg", "both.jpg"])
    assert first.crop.shape == (224, 224, 3) and first.crop.dtype == np.uint8
    np.testing.assert_array_equal(first.crop, square_crop(photos["person_a_1"], first.face.box))
    assert first.report.faces_seen == 1 and second.report.faces_seen == 2
    assert second.report.warnings == ("2 faces found; number 0 was taken, counting from 0 at the left",)
    assert str(second.report).startswith("warning: both.jpg: 2 faces found")
    assert second.report.summary.startswith("both.jpg: face 4")
    for report in (first.report, second.report):
        assert report.similarity == pytest.approx(cosine(first.face, second.face), abs=1e-5)
    (whole,) = analyse_references(analyzer, [both], which="rightmost", crop="image")
    np.testing.assert_array_equal(whole.crop, whole_image(both))
    assert whole.report.similarity is None and "number 1 was taken" in whole.report.warnings[0]


def test_the_photo_of_another_person_is_pointed_out(analyzer, photos):
    names = ["person_b_1", "person_a_1", "person_b_2"]
    references = analyse_references(analyzer, [photos[name] for name in names], names=names)
    assert ["another person" in str(r.report) for r in references] == [False, True, False]


def test_reference_errors_name_the_photo(analyzer, photos):
    with pytest.raises(MagicMirrorError, match="no reference photo"):
        analyse_references(analyzer, [])
    with pytest.raises(NoFaceError, match=r"photo 2 \(640 x 480 px\): no face .* Use"):
        analyse_references(analyzer, [photos["person_a_1"], BLANK])
    with pytest.raises(FaceChoiceError, match=r"me.jpg .*face 1 .* 1 found"):
        analyse_references(analyzer, [photos["person_a_1"]], which=1, names=["me.jpg"])
    with pytest.raises(SettingError, match="'body'"):
        analyse_references(analyzer, [photos["person_a_1"]], crop="body")


def test_several_faces_in_one_photo_are_framed_where_they_are(analyzer, photos):
    """The number that the picture shows is the one that `which` takes."""
    left, middle = photos["person_a_2"], resized(photos["person_b_1"], 0.5)
    group = side_by_side(side_by_side(left, middle), photos["impostor_1"])
    (shown,) = look_at(analyzer, [group], which=1)
    assert len(shown.faces) == 3 and shown.taken is shown.faces[1]
    (alone,) = references_from(look_at(analyzer, [middle]))
    (reference,) = references_from([shown])
    assert cosine(reference.face, alone.face) > 0.7
    assert "3 faces found; number 1 was taken" in reference.report.warnings[0]

    picture = draw_faces(group, shown.faces, shown.taken)
    _, columns = np.nonzero((picture == ImageColor.getrgb(TAKEN)).all(axis=-1))
    scale = picture.shape[1] / group.shape[1]
    assert left.shape[1] * scale < columns.min() < columns.max() < (left.shape[1] + middle.shape[1]) * scale


def test_weights(analyzer, photos):
    """A photo of weight 0 is not looked at, a wrong list of weights is told before any is."""
    images = [BLANK, photos["person_a_1"], photos["person_a_2"]]
    references = analyse_references(analyzer, images, weights=[0, 2, 0.5])
    assert [(r.report.name, r.weight) for r in references] == [("photo 2", 2), ("photo 3", 0.5)]
    for weights, message in (
        ([1, 1], "2 weights for 3 photos"),
        ([1, 1, -0.5], r"photo 3 is -0\.5; .* 0 to 100"),
        ([1, float("nan"), 1], "photo 2 is nan"),
        ([1, 100.5, 1], r"photo 2 is 100\.5"),
        ([0, 0, 0], "all weights are 0"),
    ):
        with pytest.raises(SettingError, match=message):
            look_at(None, images, weights=weights)


def test_photos_without_a_face_may_be_left_out(analyzer, photos):
    looked = look_at(analyzer, [BLANK, photos["person_a_1"], BLANK])
    assert [photo.taken is None for photo in looked] == [True, False, True]
    assert [photo.name for photo in with_faces(looked)] == ["photo 2"]
    (reference,) = references_from(with_faces(looked))
    assert reference.report.name == "photo 2" and reference.report.similarity is None
    with pytest.raises(NoFaceError, match=r"photo 1 \(640 x 480 px\): no face"):
        references_from(looked)
    with pytest.raises(NoFaceError, match=r"photo 1 .*, photo 3 \(640 x 480 px\): no face .* Use"):
        with_faces([looked[0], looked[2]])
    with pytest.raises(FaceChoiceError, match=r"photo 2 .*face 1 .* 1 found"):
        look_at(analyzer, [BLANK, photos["person_a_1"]], which=1)


def test_each_process_analyses_on_its_own_gpu(insightface_root, monkeypatch):
    """What onnxruntime is asked for."""
    from insightface.app import FaceAnalysis

    asked = []

    class Recorded(FaceAnalysis):
        def __init__(self, *args, providers, **options):
            asked.extend(providers)
            super().__init__(*args, providers=["CPUExecutionProvider"], **options)

    monkeypatch.setattr("insightface.app.FaceAnalysis", Recorded)
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 3)
    assert FaceAnalyzer(insightface_root, "buffalo_sc").device == "cpu"
    assert asked == [("CUDAExecutionProvider", {"device_id": 3}), "CPUExecutionProvider"]
