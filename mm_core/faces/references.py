"""Reference photos: taking one face from each, and saying in plain words what will cost likeness."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import FaceChoiceError, MagicMirrorError, NoFaceError, SettingError
from ..limits import REFERENCES
from .analysis import Face, FaceAnalyzer, select_face
from .crop import square_crop, whole_image
from .search import WEAK, evidence, find_faces_anyhow, smallest_face

MIN_SIZE = 112  # pixels: ArcFace sees the face at 112 px, the image encoder's crop too; below, both are enlarged
MIN_SCORE = 0.65  # portraits score 0.8 to 0.9; the detector gives up at 0.5
MIN_SHARPNESS = 35.0  # portraits: 290 and more; blurred by 1% of the face 45 to 90 (cosine .95), by 2% under 20 (.75)
_NOTHING_LEFT = 0.2  # of that limit: blurred by 3% of the face 4 to 9 (cosine .46 to .67), by 4% 2 to 7 (.28 to .50)
MAX_BLOWN = 0.15  # of the face: portraits at most .0003; twice the light .06 to .57 (cosine .57 to .94)
MIN_BRIGHTEST = 40.0  # of 255: portraits 184 to 218; a fifth of the light 37 to 43 (cosine .88 to .94)
_BRIGHT = 190.0  # sharpness falls with the square of the light: below, its limit falls as well
MAX_TURN = 35.0  # degrees: beyond, the far eye foreshortens and the recogniser has half a face
MAX_WEIGHT = 100.0
MIN_SAME_PERSON = 0.25  # cosine: photos of one person were seen at .51 to .80, of different people at .11 at most

_NO_FACE_IN = (
    "{photos}: no face was found, neither in the photo as it is nor turned. Use a photo in which both eyes and the "
    "mouth are seen and the face is at least {limit} px across"
)


@dataclass(frozen=True, kw_only=True)
class PhotoReport:
    """What was found in one photo. Numbers as in `Face`; `warnings` are sentences for the user, () if all is well.

    faces_seen: how many faces the photo shows.
    similarity: cosine, -1 to 1, of this face to the mean of the other photos' faces; None if it is the only photo.
    """

    name: str
    score: float
    size: float
    yaw: float
    pitch: float
    roll: float
    sharpness: float
    faces_seen: int
    similarity: float | None
    warnings: tuple[str, ...]

    def __str__(self) -> str:
        """The warnings, then the numbers."""
        return "\n".join([*self.warned, self.summary])

    @property
    def warned(self) -> list[str]:
        """The warnings as lines that name the photo."""
        return [f"warning: {self.name}: {warning}" for warning in self.warnings]

    @property
    def summary(self) -> str:
        """The numbers in one line."""
        likeness = "" if self.similarity is None else f", similarity to the other photos {self.similarity:.2f}"
        return (
            f"{self.name}: face {self.size:.0f} px across, detection score {self.score:.2f}, yaw {self.yaw:.0f}, "
            f"pitch {self.pitch:.0f}, roll {self.roll:.0f} degrees, sharpness {self.sharpness:.0f}{likeness}"
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Reference:
    """One photo of the person: the face taken, its picture for the image encoder, (224, 224, 3) uint8 RGB, a report.

    weight: how much it counts against the other photos, above 0.
    """

    face: Face
    crop: np.ndarray
    report: PhotoReport
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Photo:
    """A photo, (H, W, 3) uint8 RGB, that was looked at: its faces from left to right, and the one taken, if any.

    turned: by how many degrees, clockwise, the photo was turned for its faces to be upright.
    covered: what of the face taken is covered, as in `FaceAnalyzer.covered`.
    """

    name: str
    image: np.ndarray
    faces: tuple[Face, ...]
    taken: Face | None
    weight: float = 1.0
    turned: int = 0
    covered: str | None = None


def parse_weights(text: str, photos: int | None = None) -> list[float] | None:
    """How much each photo counts: "1, 0.5" -> [1.0, 0.5], an empty text -> None.

    photos: how many there are, if that is known. Raises SettingError.
    """
    if not text.strip():
        return None
    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise SettingError(f'weights is {text!r}; it must be one number a photo, such as "1, 0.5", or empty') from error
    check_weights(weights, len(weights) if photos is None else photos)
    return weights


def check_number(photos: int) -> None:
    """Raise MagicMirrorError for no photos of a person, or too many."""
    if not photos:
        raise MagicMirrorError("no reference photo was given: connect at least one photo of the person")
    if photos > REFERENCES:
        raise MagicMirrorError(f"{photos} reference photos were given; use at most {REFERENCES}, the best ones")


def check_weights(weights: Sequence[float], photos: int) -> None:
    """Raise SettingError unless there is one weight a photo, in its range, and a photo is left."""
    if len(weights) != photos:
        raise SettingError(f"{len(weights)} weights for {photos} photos; give one number a photo, in their order")
    for number, weight in enumerate(weights, 1):
        if not 0 <= weight <= MAX_WEIGHT:
            raise SettingError(
                f"the weight of photo {number} is {weight:g}; it must be a number from 0 to {MAX_WEIGHT:g}"
            )
    if not any(weights):
        raise SettingError("all weights are 0, which leaves no photo; give at least one photo a weight above 0")


def analyse_references(
    analyzer: FaceAnalyzer,
    images: Sequence[np.ndarray],
    *,
    which: str | int = "largest",
    crop: str = "face",
    names: Sequence[str] | None = None,
    weights: Sequence[float] | None = None,
) -> list[Reference]:
    """One Reference per photo of one person, in order: `look_at`, then `references_from`.

    Raises MagicMirrorError without photos, NoFaceError and FaceChoiceError naming the photo, SettingError for `crop`.
    """
    return references_from(look_at(analyzer, images, which=which, names=names, weights=weights), crop=crop)


def look_at(
    analyzer: FaceAnalyzer,
    images: Sequence[np.ndarray],
    *,
    which: str | int = "largest",
    names: Sequence[str] | None = None,
    weights: Sequence[float] | None = None,
) -> list[Photo]:
    """Find the faces in photos of one person, and take one from each that shows any.

    A photo in which no face is found well is looked at turned and in parts as well: see `search.find_faces_anyhow`.

    images: (H, W, 3) uint8 RGB each, of any sizes. which: the face to take from each, as in `select_face`.
    names: one for each image, for messages; by default photo 1 and so on.
    weights: one for each image, 0 to MAX_WEIGHT, how much it counts; by default all the same. A photo of weight 0 is
    left out.

    Raises MagicMirrorError without photos or with too many, SettingError for the weights, FaceChoiceError naming the
    photo.
    """
    check_number(len(images))
    names = names or [f"photo {number}" for number in range(1, len(images) + 1)]
    weights = [1.0] * len(images) if weights is None else weights
    check_weights(weights, len(images))
    photos = []
    for name, image, weight in zip(names, images, weights, strict=True):
        if not weight:
            continue
        look = find_faces_anyhow(analyzer, image)
        try:
            taken = select_face(list(look.faces), which) if look.faces else None
        except FaceChoiceError as error:
            raise FaceChoiceError(f"{_described(name, image)}: {error}") from error
        photos.append(
            Photo(
                name=name,
                image=look.image,
                faces=look.faces,
                taken=taken,
                weight=weight,
                turned=look.turned,
                covered=None if taken is None else analyzer.covered(look.image, taken),
            )
        )
    return photos


def with_faces(photos: Sequence[Photo]) -> list[Photo]:
    """Those that show a face. Raises NoFaceError if none does."""
    found = [photo for photo in photos if photo.taken is not None]
    if not found:
        raise _no_face(photos)
    return found


def references_from(photos: Sequence[Photo], *, crop: str = "face") -> list[Reference]:
    """One Reference per photo.

    crop: "face" for a square of twice the face's size, "image" for the whole picture's centre.

    Raises NoFaceError naming the photo that shows none, SettingError for `crop`.
    """
    if crop not in ("face", "image"):
        raise SettingError(f"reference crop {crop!r} is unknown: choose 'face' or 'image'")
    for photo in photos:
        if photo.taken is None:
            raise _no_face([photo])
    similarities = _similarities([photo.taken for photo in photos])
    return [
        Reference(
            face=photo.taken,
            crop=square_crop(photo.image, photo.taken.box) if crop == "face" else whole_image(photo.image),
            report=_report(photo, photo.taken, similarity),
            weight=photo.weight,
        )
        for photo, similarity in zip(photos, similarities, strict=True)
    ]


def _no_face(photos: Sequence[Photo]) -> NoFaceError:
    return NoFaceError(
        _NO_FACE_IN,
        key="no_face",
        photos=", ".join(_described(photo.name, photo.image) for photo in photos),
        limit=max(smallest_face(photo.image.shape) for photo in photos),
    )


def _described(name: str, image: np.ndarray) -> str:
    return f"{name} ({image.shape[1]} x {image.shape[0]} px)"


def _similarities(faces: list[Face]) -> list[float | None]:
    """Cosine of each face to the mean of all others, -1 to 1; None for a single face."""
    if len(faces) == 1:
        return [None]
    embeddings = np.stack([face.normed_embedding for face in faces])
    others = embeddings.sum(axis=0) - embeddings
    return [float(own @ mean / np.linalg.norm(mean)) for own, mean in zip(embeddings, others, strict=True)]


def _report(photo: Photo, face: Face, similarity: float | None) -> PhotoReport:
    told = [*_found(photo, face), *_seen(face, photo.covered)]
    if similarity is not None and similarity < MIN_SAME_PERSON:
        told.append(
            f"this may be another person: similarity {similarity:.2f} to the other photos, "
            f"below {MIN_SAME_PERSON}; photos of one person usually reach 0.5"
        )
    return PhotoReport(
        name=photo.name,
        score=face.score,
        size=face.size,
        yaw=face.yaw,
        pitch=face.pitch,
        roll=face.roll,
        sharpness=face.sharpness,
        faces_seen=len(photo.faces),
        similarity=similarity,
        warnings=tuple(told),
    )


def _found(photo: Photo, face: Face) -> list[str]:
    """What the user should check: which face it is, and whether it is one."""
    told = []
    if photo.turned:
        told.append(f"the photo was turned by {photo.turned} degrees clockwise, where its face is upright")
    if len(photo.faces) > 1:
        number = next(number for number, other in enumerate(photo.faces) if other is face)
        told.append(f"{len(photo.faces)} faces found; number {number} was taken, counting from 0 at the left")
    if evidence(face) < WEAK:
        told.append("the face is hardly recognised, it may be no face or a stranger's; look at the framed photo")
    return told


def _seen(face: Face, covered: str | None) -> list[str]:
    """What of the photo costs likeness."""
    told = []
    if face.size < MIN_SIZE:
        told.append(f"the face is only {face.size:.0f} px across; use a photo where it is at least {MIN_SIZE} px")
    if face.score < MIN_SCORE:
        told.append(f"the face is hard to make out (detection score {face.score:.2f}, below {MIN_SCORE})")
    needed = MIN_SHARPNESS * min(1.0, face.brightest / _BRIGHT) ** 2
    if face.sharpness < needed:
        left = "; little of the person is left" if face.sharpness < _NOTHING_LEFT * needed else ""
        told.append(f"the face is blurred (sharpness {face.sharpness:.0f}, below {needed:.0f}){left}")
    if face.blown > MAX_BLOWN:
        told.append(f"the face is over-exposed ({face.blown:.0%} of it is white, more than {MAX_BLOWN:.0%})")
    if face.brightest < MIN_BRIGHTEST:
        told.append(f"the face is too dark (brightness {face.brightest:.0f} of 255, below {MIN_BRIGHTEST:.0f})")
    if covered:
        told.append(f"the face is covered ({covered}); use a photo without sunglasses, mask or hand")
    if max(abs(face.yaw), abs(face.pitch)) > MAX_TURN:
        turn = f"yaw {face.yaw:.0f}, pitch {face.pitch:.0f} degrees"
        told.append(f"the face is turned away ({turn}); the limit for a good likeness is {MAX_TURN:.0f}")
    return told
