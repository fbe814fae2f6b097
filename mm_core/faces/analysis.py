"""Faces in a picture: detection, ArcFace embedding, head pose and sharpness, by insightface's ONNX models."""

import functools
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import FaceChoiceError, NoFaceError, SettingError
from .packs import load_pack, onnx_files, pack_folder
from .quality import aligned, around, covered_part, measure, without_parts

# One fixed size. insightface 2.1 by default merges detections at 128 and 640 px, and where the coarse one scores higher
# its landmarks win: seen 5 px off on a 120 px face, which moves the embedding by 0.05 in cosine.
DETECTION_SIZE = (640, 640)
MIN_FACE = 20
"""Pixels of a face in the picture that the detector sees: 11 of 11 portraits are found at 20, 8 at 18, 7 at 16."""
_TILE, _STEP = DETECTION_SIZE[0], 480  # pixels: of tiles, and from one to the next: a quarter is seen twice
_SAME_FACE = 0.4  # intersection over union, as in insightface's own suppression

NO_FACE = (
    "no face was found. Use an upright photo in which both eyes and the mouth are seen and the face is at least "
    f"{MIN_FACE} px across"
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
    blown: the part of the face, 0 to 1, that is white in all channels: over-exposed.
    brightest: the brightness, 0 to 255, that 5% of the face exceed.
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
    blown: float = 0.0
    brightest: float = 255.0

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

    fetch: how the user can have a missing pack fetched, to be told.

    Raises CheckpointError for a missing, incomplete or damaged pack, SettingError for another device, and
    MagicMirrorError where insightface is not installed.
    """

    def __init__(self, root: Path, pack: str = "buffalo_l", device: str = "auto", *, fetch: str = "") -> None:
        if device not in ("auto", "cpu"):
            raise SettingError(f"The face analysis device {device!r} is unknown: choose 'auto' or 'cpu'")
        self._app = load_pack(pack_folder(Path(root), pack, fetch), device, DETECTION_SIZE)
        on_cuda = "CUDAExecutionProvider" in self._app.models["recognition"].session.get_providers()
        self.device = "cuda" if on_cuda else "cpu"

    def detect(self, image: np.ndarray, recognise: bool = True) -> list[Face]:
        """All faces of a (H, W, 3) uint8 RGB picture, left to right by the centre of their boxes; [] if there is none.

        The detector misses faces that fill the picture, so a picture without a find gets a second look with a border.
        It sees the picture at 640 px, whatever its size: `detect_in_tiles` finds what is too small for that.
        recognise: without, faces are found only, which is faster: embeddings are empty, poses are estimates.
        """
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"detect wants a (H, W, 3) uint8 RGB picture, not {image.shape} {image.dtype}")
        if min(image.shape[:2]) * seen_at(image.shape) < MIN_FACE / 2:  # half a face may be found at an edge
            return []
        found = self._find(image) or self._find_with_border(image)
        return from_left([self._describe(image, *face, recognise) for face in found])

    def detect_in_tiles(self, image: np.ndarray, scale: float) -> list[Face]:
        """`detect`, on the picture shrunk by `scale`, 0 to 1, and looked at in tiles of 640 px."""
        import cv2

        if min(image.shape[:2]) * scale < MIN_FACE / 2:
            return []
        shrunk = image if scale == 1 else cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        margin = (_TILE - _STEP) / 2
        faces = []
        for top in _starts(shrunk.shape[0]):
            for left in _starts(shrunk.shape[1]):
                tile = shrunk[top : top + _TILE, left : left + _TILE]
                for box, landmarks, score in self._find(tile):
                    x, y = (box[:2] + box[2:]) / 2
                    # A face that the tile's edge may cut is seen whole in the next tile.
                    inside = (left == 0 or x >= margin) and (top == 0 or y >= margin)
                    inside &= left + _TILE >= shrunk.shape[1] or x <= _TILE - margin
                    inside &= top + _TILE >= shrunk.shape[0] or y <= _TILE - margin
                    if inside:
                        corner = np.float32([left, top])
                        box, landmarks = (box + np.tile(corner, 2)) / scale, (landmarks + corner) / scale
                        faces.append(self._describe(image, box, landmarks, score, recognise=True))
        return merged(faces)

    def largest_at(self, image: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray] | None:
        """Landmarks, (5, 2) in pixels, and embedding, (512,), of the face with the largest box; None without a face.

        As insightface's own `get` with this `det_size`, width and height: one look, for protocols that fix it.
        """
        from insightface.app.common import Face as Found

        bgr = np.ascontiguousarray(image[:, :, ::-1])
        boxes, landmarks = self._app.det_model.detect(bgr, input_size=size)
        if not len(boxes):
            return None
        largest = int(np.argsort((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]), kind="stable")[-1])
        found = Found(bbox=boxes[largest, :4], kps=landmarks[largest], det_score=boxes[largest, 4])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # insightface's, about its own call of scikit-image
            return found.kps, self._app.models["recognition"].get(bgr, found)

    def covered(self, image: np.ndarray, face: Face) -> str | None:
        """What is covered of a face that was found in the picture: a name of PARTS or HALVES, None if nothing is.

        Each part of the aligned face is replaced by its mean colour. Where that hardly changes the embedding, there was
        nothing of the person in that part. See `quality.covered_part` for the numbers.
        """
        view, corner = around(image, face.box)
        whole = aligned(view, face.landmarks - corner)
        own = self._embed(whole)
        return covered_part({name: float(own @ self._embed(face)) for name, face in without_parts(whole)})

    def _embed(self, face: np.ndarray) -> np.ndarray:
        """The embedding of an aligned face, of length 1."""
        embedding = self._app.models["recognition"].get_feat(np.ascontiguousarray(face[:, :, ::-1])).ravel()
        return embedding / np.linalg.norm(embedding)

    def _find(self, image: np.ndarray) -> list[tuple[np.ndarray, np.ndarray, float]]:
        """Box (4,), landmarks (5, 2), both float32 in pixels, and score of each face that the detector sees."""
        bgr = np.ascontiguousarray(image[:, :, ::-1])  # as insightface wants it
        boxes, landmarks = self._app.det_model.detect(bgr, max_num=0, metric="default")
        return [(box[:4], points, float(box[4])) for box, points in zip(boxes, landmarks, strict=True)]

    def _find_with_border(self, image: np.ndarray) -> list[tuple[np.ndarray, np.ndarray, float]]:
        """`_find` with half the picture's size of black around it, as insightface's alignment puts outside."""
        import cv2

        scale = min(1.0, seen_at(image.shape))  # before the border, which would be nine times a large picture
        shrunk = image if scale == 1 else cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        border = max(shrunk.shape[:2]) // 2
        found = self._find(np.pad(shrunk, ((border, border), (border, border), (0, 0))))
        return [((box - border) / scale, (points - border) / scale, score) for box, points, score in found]

    def _describe(
        self, image: np.ndarray, box: np.ndarray, landmarks: np.ndarray, score: float, recognise: bool
    ) -> Face:
        """A Face of what was found in the picture, in its pixels."""
        from insightface.app.common import Face as Found

        view, corner = around(image, box)
        found = Found(bbox=box - np.tile(corner, 2), kps=landmarks - corner, det_score=score)
        if recognise:
            bgr = np.ascontiguousarray(view[:, :, ::-1])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # insightface's, about its own call of scikit-image
                for name, model in self._app.models.items():
                    if name != "detection":
                        model.get(bgr, found)
        yaw, pitch, roll = estimate_pose(landmarks)
        if found.pose is not None:
            pitch, yaw, roll = (float(angle) for angle in found.pose)
        sharpness, blown, brightest = measure(view, found.kps)
        return Face(
            box=box.astype(np.float32),
            landmarks=landmarks.astype(np.float32),
            score=score,
            embedding=np.zeros(0, np.float32) if found.embedding is None else found.embedding.astype(np.float32),
            yaw=yaw,
            pitch=pitch,
            roll=roll,
            size=float(max(box[2] - box[0], box[3] - box[1])),
            sharpness=sharpness,
            blown=blown,
            brightest=brightest,
        )


def seen_at(shape: Sequence[int]) -> float:
    """By how much the detector shrinks, or enlarges, a picture of this (H, W, ...) as a whole."""
    return DETECTION_SIZE[0] / max(shape[:2])


def number_of_tiles(shape: Sequence[int], scale: float) -> int:
    """How many `detect_in_tiles` looks at, in a picture of this (H, W, ...)."""
    return math.prod(len(_starts(round(side * scale))) for side in shape[:2])


def from_left(faces: list[Face]) -> list[Face]:
    """Sorted by the centres of their boxes."""
    return sorted(faces, key=lambda face: float(face.box[0] + face.box[2]))


def merged(faces: Sequence[Face]) -> list[Face]:
    """Each face once, as it was seen best, left to right."""
    kept: list[Face] = []
    for face in sorted(faces, key=lambda face: -face.score):
        if all(_overlap(face.box, other.box) <= _SAME_FACE for other in kept):
            kept.append(face)
    return from_left(kept)


def _overlap(one: np.ndarray, other: np.ndarray) -> float:
    """Intersection over union of two boxes."""
    width, height = np.minimum(one[2:], other[2:]) - np.maximum(one[:2], other[:2])
    common = max(width, 0.0) * max(height, 0.0)
    areas = sum(float((box[2] - box[0]) * (box[3] - box[1])) for box in (one, other))
    return float(common / (areas - common))


def _starts(length: int) -> list[int]:
    """Where tiles begin along a side, so that they cover it."""
    count = max(1, math.ceil((length - _TILE) / _STEP) + 1)
    return [min(number * _STEP, max(0, length - _TILE)) for number in range(count)]


def shared_analyzer(root: Path, pack: str, device: str = "auto") -> FaceAnalyzer:
    """A FaceAnalyzer that the next call takes over while the pack's files stay what they are; errors as there.

    Two are kept, the last ones used, on the processor only: on CUDA they would hold memory that the video model needs
    and ComfyUI cannot see.
    """
    files = tuple((file.name, file.stat().st_mtime_ns) for file in onnx_files(root / "models" / pack))
    analyzer = _kept(root, pack, device, files)
    if analyzer.device != "cpu":
        _kept.cache_clear()
    return analyzer


@functools.lru_cache(maxsize=2)
def _kept(root: Path, pack: str, device: str, files: tuple[tuple[str, int], ...]) -> FaceAnalyzer:
    return FaceAnalyzer(root, pack, device)


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
    20 degrees down. Of rendered heads, whose landmarks the detector found, yaw is 4 degrees too large at 10, 5 to 7 at
    20 to 70, right at 80, and 9 too small at 90, beyond which it cannot go: off by 4 to 11 degrees RMS.
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
