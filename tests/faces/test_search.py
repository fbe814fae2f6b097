"""Photos as people have them: turned, small, blurred, cut out, in groups; what is found, said, and how like it is."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from skimage.data import astronaut

from mm_core.errors import MagicMirrorError, NoFaceError
from mm_core.faces.analysis import Face, FaceAnalyzer
from mm_core.faces.references import Reference, analyse_references, look_at, references_from
from mm_core.faces.search import find_faces_anyhow, smallest_face
from mm_core.picture_file import over_grey, read_image

cached_analyzer = functools.cache(FaceAnalyzer)
Change = Callable[[np.ndarray, Face], np.ndarray]

TURNED, SMALL, COVERED = "was turned by {} degrees", "px across; use", "is covered ({})"
BLURRED, NOTHING_LEFT, WHITE, DARK = "is blurred", "little of the person is left", "over-exposed", "too dark"


@pytest.fixture
def analyzer(insightface_root: Path) -> FaceAnalyzer:
    return cached_analyzer(insightface_root, "buffalo_sc")


@functools.cache
def photo(photographs: Path, name: str) -> np.ndarray:
    return astronaut() if name == "astronaut" else read_image(photographs / f"{name}.jpg")


def turned(degrees: int, first: Change | None = None) -> Change:
    """Clockwise, by any angle; the corners become grey."""

    def change(image: np.ndarray, face: Face) -> np.ndarray:
        image = image if first is None else first(image, face)
        if degrees % 90 == 0:
            return np.ascontiguousarray(np.rot90(image, -degrees // 90))
        return np.array(Image.fromarray(image).rotate(-degrees, Image.Resampling.BICUBIC, fillcolor="grey"))

    return change


def sized(pixels: int) -> Change:
    """The face so many pixels across."""

    def change(image: np.ndarray, face: Face) -> np.ndarray:
        factor = pixels / face.size
        return cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)

    return change


def within(width: int, height: int, pixels: int) -> Change:
    """A large photo of something else, the face somewhere in it."""

    def change(image: np.ndarray, face: Face) -> np.ndarray:
        small = sized(pixels)(image, face)
        noise = np.random.default_rng(0).integers(0, 256, (height // 40, width // 40, 3), dtype=np.uint8)
        large = cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
        top, left = (height - small.shape[0]) // 3, (width - small.shape[1]) * 2 // 3
        large[top : top + small.shape[0], left : left + small.shape[1]] = small
        return large

    return change


def blurred(part: float) -> Change:
    """Deviation in sizes of the face."""
    return lambda image, face: cv2.GaussianBlur(image, (0, 0), part * face.size)


def lit(factor: float) -> Change:
    return lambda image, _: (image * factor).clip(0, 255).astype(np.uint8)


def covered(part: str) -> Change:
    """A bar in one colour over a part of the face."""

    def change(image: np.ndarray, face: Face) -> np.ndarray:
        left, top, right, bottom = face.box.round().astype(int).tolist()
        eyes, nose = face.landmarks[:2, 1].mean(), face.landmarks[2]
        tall = 0.12 * face.size
        areas = {
            "mouth": (slice(int(nose[1]), bottom), slice(left, right)),
            "eyes": (slice(int(eyes - tall), int(eyes + tall)), slice(left, right)),
            "left half": (slice(top, bottom), slice(left, int(nose[0]))),
        }
        image = image.copy()
        image[areas[part]] = (60, 90, 140)
        return image

    return change


def cut_out(image: np.ndarray, face: Face) -> np.ndarray:
    """The head, without anything around it."""
    rows, columns = np.indices(image.shape[:2])
    x, y = (face.box[:2] + face.box[2:]) / 2
    alpha = np.where(np.hypot(columns - x, (rows - y) / 1.2) < 0.75 * face.size, 255, 0).astype(np.uint8)
    return np.array(over_grey(Image.fromarray(np.dstack([image, alpha]))))


def tight(image: np.ndarray, face: Face) -> np.ndarray:
    left, top, right, bottom = face.box.round().astype(int).tolist()
    return image[max(top, 0) : bottom, max(left, 0) : right]


def beside(others: list[np.ndarray]) -> Change:
    """At the left of others, all at the same height."""

    def change(image: np.ndarray, face: Face) -> np.ndarray:
        return np.hstack([np.array(Image.fromarray(one).resize((450, 560))) for one in (image, *others)])

    return change


# What was done to which photo: by how many degrees it is turned back, what is said of it, the cosine to the good photo.
CASES = {
    "lying, to the left": ("person_a_2", turned(90), 270, [TURNED.format(270)], 0.98),
    "on its head": ("person_a_2", turned(180), 180, [TURNED.format(180)], 0.98),
    "lying, to the right: its embedding would be longer": ("person_b_2", turned(270), 90, [TURNED.format(90)], 0.98),
    "on its head: as it is, a stranger's": ("impostor_1", turned(180), 180, [TURNED.format(180)], 0.98),
    "on its head: not found as it is": ("astronaut", turned(180), 180, [TURNED.format(180)], 0.98),
    "tilted by 35": ("person_b_1", turned(-35), 0, [], 0.85),
    "tilted by 60": ("person_b_1", turned(60), 270, [TURNED.format(270)], 0.85),
    "lying and blurred": ("person_a_1", turned(90, blurred(0.02)), 270, [TURNED.format(270), BLURRED], 0.7),
    "on its head and small": ("impostor_2", turned(180, sized(40)), 180, [TURNED.format(180), SMALL], 0.8),
    "150 px in 24 megapixels": ("person_b_2", within(6000, 4000, 150), 0, [], 0.85),
    "75 px in 6 megapixels, lying": (
        "person_a_2",
        turned(90, within(3000, 2000, 75)),
        270,
        [TURNED.format(270), SMALL],
        0.85,
    ),
    "130 px in a panorama": ("impostor_2", within(12000, 900, 130), 0, [], 0.85),
    "80 px": ("person_a_2", sized(80), 0, [SMALL], 0.9),
    "24 px": ("person_a_2", sized(24), 0, [SMALL, BLURRED], 0.5),
    "only the face": ("person_a_2", tight, 0, [], 0.85),
    "hardly blurred": ("person_a_2", blurred(0.01), 0, [], 0.9),
    "blurred": ("person_a_2", blurred(0.02), 0, [BLURRED], 0.7),
    "blurred beyond recognition": ("person_b_1", blurred(0.06), 0, [NOTHING_LEFT], 0.1),
    "over-exposed": ("person_a_2", lit(2.5), 0, [WHITE], 0.5),
    "dark": ("person_b_1", lit(0.15), 0, [DARK], 0.8),
    "with a mask": ("person_a_2", covered("mouth"), 0, [COVERED.format("mouth")], 0.55),
    "with a bar over the eyes": ("person_b_2", covered("eyes"), 0, [COVERED.format("eyes")], 0.45),
    "half covered": ("impostor_2", covered("left half"), 0, [COVERED.format("left half")], 0.5),
    "cut out": ("impostor_1", cut_out, 0, [], 0.9),
}


def looked(analyzer: FaceAnalyzer, image: np.ndarray, which: str | int = "largest") -> tuple[int, Reference]:
    """By how much the photo was turned, and the face taken."""
    (seen,) = look_at(analyzer, [image], which=which)
    (reference,) = references_from([seen])
    return seen.turned, reference


def likeness(reference: Reference, good: Face) -> float:
    return float(reference.face.normed_embedding @ good.normed_embedding)


@pytest.mark.parametrize(("name", "change", "back", "said", "cosine"), CASES.values(), ids=CASES)
def test_photos_as_people_have_them(
    analyzer: FaceAnalyzer, photographs: Path, name: str, change: Change, back: int, said: list[str], cosine: float
) -> None:
    image = photo(photographs, name)
    (good,) = analyzer.detect(image)
    was_turned, reference = looked(analyzer, change(image, good))
    warnings = reference.report.warnings
    assert was_turned == back
    assert likeness(reference, good) > cosine
    assert [any(words in warning for warning in warnings) for words in said] == [True] * len(said)
    assert said or not warnings  # nothing is said of a photo that is good enough
    assert str(reference.report).startswith("warning: " if said else "photo 1: face ")


def test_a_group_is_turned_and_counted_from_the_left(analyzer: FaceAnalyzer, photographs: Path) -> None:
    people = [photo(photographs, name) for name in ("person_a_2", "impostor_1", "person_b_2")]
    good = [analyzer.detect(person)[0] for person in people]
    upright = beside(people[1:])(people[0], good[0])
    was_turned, reference = looked(analyzer, turned(180)(upright, good[0]), 1)
    assert was_turned == 180 and any("3 faces found; number 1 was taken" in text for text in reference.report.warnings)
    (seen,) = look_at(analyzer, [upright])
    for face, own in zip(seen.faces, good, strict=True):
        assert float(face.normed_embedding @ own.normed_embedding) > 0.8
    assert likeness(reference, seen.faces[1]) > 0.98


def test_a_photo_in_which_the_face_is_found_well_is_looked_at_once(
    analyzer: FaceAnalyzer, photographs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the face is what `detect` finds; the photo that lies is looked at four times."""
    looks: list[tuple[int, ...]] = []
    detect = analyzer.detect
    monkeypatch.setattr(analyzer, "detect", lambda image: (looks.append(image.shape), detect(image))[1])
    for name in ("person_a_1", "person_b_1", "impostor_2", "astronaut"):
        image = photo(photographs, name)
        (face,) = find_faces_anyhow(analyzer, image).faces
        (own,) = detect(image)
        assert np.array_equal(face.embedding, own.embedding) and looks == [image.shape]
        looks.clear()
    find_faces_anyhow(analyzer, np.rot90(photo(photographs, "person_a_1")))
    assert len(looks) == 4


def test_what_shows_nobody(analyzer: FaceAnalyzer) -> None:
    """The error names the size that a face must have in this photo."""
    grey = np.full((900, 1200, 3), 110, np.uint8)
    with pytest.raises(NoFaceError, match=r"photo 1 \(1200 x 900 px\): .* nor turned.* at least 20 px"):
        analyse_references(analyzer, [grey])
    for shape in ((1, 5000, 3), (5000, 1, 3), (3, 3, 3), (1, 1, 3)):
        with pytest.raises(NoFaceError, match="no face was found"):
            analyse_references(analyzer, [np.zeros(shape, np.uint8)])
    assert smallest_face((4000, 6000, 3)) == 43  # 40 px were found in one of three photos of this size, 60 px in three
    with pytest.raises(MagicMirrorError, match=r"65 reference photos .* at most 64"):
        look_at(analyzer, [grey] * 65)


def test_a_large_photo_without_a_face_ends_soon(analyzer: FaceAnalyzer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A strip of 20 x 100,000 was looked at 1,504 times, which took a minute; a photo of 24 megapixels 128 times."""
    looks: list[tuple[int, ...]] = []
    monkeypatch.setattr(analyzer, "_find", lambda image: (looks.append(image.shape), [])[1])
    for shape in ((20, 100_000, 3), (100_000, 20, 3), (200, 50_000, 3), (1, 100_000, 3), (4000, 6000, 3)):
        find_faces_anyhow(analyzer, np.zeros(shape, np.uint8))
        assert len(looks) <= 128, shape
        looks.clear()
    assert smallest_face((200, 50_000)) == 66


def test_a_large_picture_needs_little_memory(insightface_root: Path) -> None:
    """A border around the whole picture of 1.6 MB would be 490 MB."""
    code = f"""
import resource, numpy as np
from pathlib import Path
from mm_core.faces.analysis import FaceAnalyzer
from mm_core.faces.search import find_faces_anyhow
analyzer = FaceAnalyzer(Path({str(insightface_root)!r}), "buffalo_sc", "cpu")
find_faces_anyhow(analyzer, np.full((64, 640, 3), 90, np.uint8))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert not find_faces_anyhow(analyzer, np.full((60, 9000, 3), 90, np.uint8)).faces
assert not find_faces_anyhow(analyzer, np.full((1, 40000, 3), 90, np.uint8)).faces
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=root, capture_output=True, text=True)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    assert int(result.stdout) < 200_000  # KiB
