"""Faces in a picture: detection, ArcFace embedding, head pose and sharpness, by insightface's ONNX models."""

import contextlib
import io
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CheckpointError, FaceChoiceError, MagicMirrorError, NoFaceError, SettingError, downloading

MODULES = ("detection", "recognition", "landmark_3d_68")
# One fixed size. insightface 2.1 by default merges detections at 128 and 640 px, and where the coarse one scores higher
# its landmarks win: seen 5 px off on a 120 px face, which moves the embedding by 0.05 in cosine.
DETECTION_SIZE = (640, 640)
ALIGNED_SIZE = 112  # pixels: the aligned crop that ArcFace sees

NO_FACE = (
    "no face was found. Use an upright photo in which both eyes and the mouth are seen and the face is at least 20 px "
    "across"
)

# Mean positions of the five landmarks, in eye distances: x right, y down, z towards the viewer. Across and down: half
# way between ArcFace's alignment template and seven portraits, most of them smiling; depth: a mean head's.
_MEAN_LANDMARKS = np.array(
    [[-0.50, -0.55, -0.15], [0.50, -0.55, -0.15], [0.0, 0.04, 0.38], [-0.44, 0.53, -0.04], [0.44, 0.53, -0.04]]
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Face:
    """One detected face.

    box: (4,) float32: left, top, right and bottom in pixels of the picture; may reach outside it.
    landmarks: (5, 2) float32 in pixels: the eye on the left of the picture, the one on its right, tip of the nose,
    left and right corner of the mouth.
    score: the confidence of the detector, 0.5 to 1.
    embedding: (512,) float32, by ArcFace, not normalised (its length is about 25); empty where it was not asked for.
    yaw, pitch, roll: degrees; positive: turned to the right of the picture, up, tilted clockwise in the picture.
    size: the larger side of the box in pixels.
    sharpness: variance of the Laplacian of the grey face aligned to 112 pixels; higher is sharper.
    """

    box: np.ndarray
    landmarks: np.ndarray
    score: float
    embedding: np.ndarray
    yaw: float
    pitch: float
    roll: float
    size: float
    sharpness: float

    @property
    def normed_embedding(self) -> np.ndarray:
        """(512,) float32 of length 1: the dot product of two of these is the cosine similarity, -1 to 1."""
        return self.embedding / np.linalg.norm(self.embedding)


class FaceAnalyzer:
    """Finds and describes faces with a model pack from disk. Never downloads anything.

    root: the folder that holds `models`, and in there a folder for each pack.
    pack: such as buffalo_l or antelopev2; one that was unzipped a folder too deep is found as well.
    device: auto uses CUDA where onnxruntime can, otherwise the processor; cpu never uses CUDA. The attribute of this
    name tells what is really used, cuda or cpu.

    Raises CheckpointError for a missing, incomplete or damaged pack, SettingError for another device, and
    MagicMirrorError where insightface is not installed.
    """

    def __init__(self, root: Path, pack: str = "buffalo_l", device: str = "auto") -> None:
        if device not in ("auto", "cpu"):
            raise SettingError(f"The face analysis device {device!r} is unknown: choose 'auto' or 'cpu'")
        self._app = _load_pack(_pack_folder(Path(root), pack), device)
        on_cuda = "CUDAExecutionProvider" in self._app.models["recognition"].session.get_providers()
        self.device = "cuda" if on_cuda else "cpu"

    def detect(self, image: np.ndarray, recognise: bool = True) -> list[Face]:
        """All faces of a (H, W, 3) uint8 RGB picture, left to right by the centre of their boxes; [] if there is none.

        The detector misses faces that fill the picture, so a picture without a find gets a second look with a border.
        recognise: without, faces are found only, which is faster: embeddings are empty, poses are estimates.
        """
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"detect wants a (H, W, 3) uint8 RGB picture, not {image.shape} {image.dtype}")
        faces = self._detect_with_border(image, 0, recognise)
        if not faces:
            faces = self._detect_with_border(image, max(image.shape[:2]) // 2, recognise)
        return sorted(faces, key=lambda face: float(face.box[0] + face.box[2]))

    def _detect_with_border(self, image: np.ndarray, border: int, recognise: bool) -> list[Face]:
        # insightface wants BGR. The border is black, as is what insightface's own alignment puts outside a picture.
        bgr = np.pad(image[:, :, ::-1], ((border, border), (border, border), (0, 0)))
        found = self._app.get(bgr) if recognise else _find(self._app, bgr)
        return [_describe(image, face, border) for face in found]


def select_face(faces: list[Face], which: str | int) -> Face:
    """The face meant by `which`: "largest", "leftmost", "rightmost", or an index counted from 0, left to right.

    Raises NoFaceError if `faces` is empty, FaceChoiceError if there is no such face.
    """
    if not faces:
        raise NoFaceError(NO_FACE)
    if which == "largest":
        return max(faces, key=lambda face: face.size)
    if which in ("leftmost", "rightmost"):
        return faces[0 if which == "leftmost" else -1]
    if isinstance(which, int) and 0 <= which < len(faces):
        return faces[which]
    raise FaceChoiceError(
        f"face {which!r} does not exist: {len(faces)} found. "
        f"Choose 'largest', 'leftmost', 'rightmost' or a number from 0 to {len(faces) - 1}, counted from the left"
    )


def estimate_pose(landmarks: np.ndarray) -> tuple[float, float, float]:
    """Yaw, pitch and roll in degrees from five landmarks, (5, 2) pixels; signs as in `Face`.

    The mean face, seen by a distant camera, in least squares. For faces whose landmarks differ from the mean by 5% of
    the eye distance, seen from half a metre with 2% of noise, it is off by 7 degrees RMS in yaw and 2 (frontal) to 5
    (yaw 50) in roll. Pitch is coarse: 8 degrees RMS, and a broad smile, which lifts the corners of the mouth, reads as
    20 degrees down.
    """
    model = _MEAN_LANDMARKS - _MEAN_LANDMARKS.mean(axis=0)
    projection = np.linalg.lstsq(model, landmarks - landmarks.mean(axis=0), rcond=None)[0].T  # (2, 3)
    u, _, vt = np.linalg.svd(projection, full_matrices=False)
    rows = u @ vt  # the nearest orthonormal pair: the first two rows of the rotation
    depth = np.cross(rows[0], rows[1])
    yaw = np.arctan2(-depth[0], np.hypot(rows[0, 0], rows[1, 0]))
    pitch = np.arctan2(depth[1], depth[2])
    roll = np.arctan2(rows[1, 0], rows[0, 0])
    return float(np.degrees(yaw)), float(np.degrees(pitch)), float(np.degrees(roll))


def download_pack(root: Path, pack: str) -> None:
    """Fetch a pack into `<root>/models/<pack>` unless it is there; only when the user asked for it.

    The models are licensed by InsightFace for non-commercial research only.
    """
    models = root.expanduser() / "models"
    if any((models / pack).rglob("*.onnx")):
        return
    with _face_packages():
        from insightface.utils.storage import download

    models.mkdir(parents=True, exist_ok=True)
    # In a folder of its own first: half a pack must not look like a pack.
    with downloading(f"{pack} into {models}"), tempfile.TemporaryDirectory(dir=models) as temporary:
        Path(download("models", pack, root=temporary)).rename(models / pack)


@contextlib.contextmanager
def _face_packages() -> Iterator[None]:
    """Around their imports: one that is missing becomes a MagicMirrorError that says what to install."""
    try:
        yield
    except (ImportError, AttributeError) as error:  # an uninstall can leave an empty onnxruntime behind
        raise MagicMirrorError(
            f"Face analysis needs insightface and onnxruntime ({error}). Install them for the Python of ComfyUI: "
            "python -m pip install insightface onnxruntime, or for CUDA onnxruntime-gpu"
        ) from error


def _pack_folder(root: Path, pack: str) -> Path:
    folder = root.expanduser().absolute() / "models" / pack
    for candidate in (folder, folder / pack):  # antelopev2.zip unpacks into a folder inside its folder
        if any(candidate.glob("*.onnx")):
            return candidate
    raise CheckpointError(
        "The face models are missing: {folder} must hold the .onnx files of insightface's pack '{pack}' "
        "(detection and recognition). Download it from github.com/deepinsight/insightface (its models are licensed "
        'for non-commercial research only) and unzip it there, or switch on "allow_download" in Load MagicMirror '
        "(--download on the command line)",
        key="face_models_missing",
        folder=folder,
        pack=pack,
    )


def _load_pack(folder: Path, device: str) -> Any:
    """An insightface FaceAnalysis on `folder`, ready to use."""
    with _face_packages():
        import onnxruntime
        from insightface.app import FaceAnalysis
    # onnxruntime offers CUDA whenever it was built with it, and goes on with the CPU if it then cannot be started.
    wants_cuda = device == "auto" and "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    providers = ["CUDAExecutionProvider"] * wants_cuda + ["CPUExecutionProvider"]
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # both libraries print while loading
            app = FaceAnalysis(name=str(folder), allowed_modules=list(MODULES), providers=providers)
            app.prepare(ctx_id=0, det_size=DETECTION_SIZE)
    except Exception as error:  # onnxruntime's errors share no base class, a pack without detector fails an assert
        raise CheckpointError(
            f"The face models in {folder} cannot be loaded: {str(error) or 'no detection model'}. "
            "Download the pack again and unzip all of its .onnx files there"
        ) from error
    if "recognition" not in app.models:
        raise CheckpointError(
            f"The face models in {folder} lack recognition, found only {', '.join(app.models)}. "
            "Use a complete pack such as buffalo_l or antelopev2"
        )
    return app


def _find(app: Any, bgr: np.ndarray) -> list[Any]:
    """What `FaceAnalysis.get` begins with."""
    from insightface.app.common import Face as Found

    boxes, landmarks = app.det_model.detect(bgr, max_num=0, metric="default")
    return [Found(bbox=box[:4], kps=kps, det_score=box[4]) for box, kps in zip(boxes, landmarks)]


def _describe(image: np.ndarray, found: Any, border: int) -> Face:
    """A Face in coordinates of `image` (RGB) from insightface's find in the same picture with a border, in pixels."""
    box = (found.bbox - border).astype(np.float32)
    landmarks = (found.kps - border).astype(np.float32)
    if found.pose is not None:
        pitch, yaw, roll = (float(angle) for angle in found.pose)
    else:
        yaw, pitch, roll = estimate_pose(landmarks)
    return Face(
        box=box,
        landmarks=landmarks,
        score=float(found.det_score),
        embedding=np.zeros(0, np.float32) if found.embedding is None else found.embedding.astype(np.float32),
        yaw=yaw,
        pitch=pitch,
        roll=roll,
        size=float(max(box[2] - box[0], box[3] - box[1])),
        sharpness=_sharpness(image, landmarks),
    )


def _sharpness(image: np.ndarray, landmarks: np.ndarray) -> float:
    import cv2
    from insightface.utils import face_align

    matrix = face_align.estimate_norm(landmarks, ALIGNED_SIZE)
    # Align at a whole multiple and shrink by area: sampling a large face at 112 px directly would invent sharpness.
    multiple = max(1, round(1 / float(np.hypot(matrix[0, 0], matrix[1, 0]))))
    matrix = face_align.estimate_norm(landmarks, ALIGNED_SIZE * multiple)
    size = (ALIGNED_SIZE * multiple, ALIGNED_SIZE * multiple)
    # Replicated, not black: the rim of a tight crop would count as the sharpest edge of the face.
    aligned = cv2.warpAffine(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), matrix, size, borderMode=cv2.BORDER_REPLICATE)
    aligned = cv2.resize(aligned, (ALIGNED_SIZE, ALIGNED_SIZE), interpolation=cv2.INTER_AREA)
    return float(cv2.Laplacian(aligned, cv2.CV_64F).var())
