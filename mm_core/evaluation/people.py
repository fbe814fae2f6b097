"""Whose videos these are: identities from the names of files and folders, their reference photos, their faces."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..errors import MagicMirrorError, NoFaceError
from ..faces.analysis import Face, FaceAnalyzer, select_face
from ..faces.tracking import find_faces
from ..picture_file import read_image
from .recognisers import Judge, describe

PHOTOS = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
VIDEOS = {".mp4", ".webm", ".mkv", ".mov", ".avi", ".m4v"}  # a gif may hold equal frames once
_NUMBER = r"[-_. ]*\d+$"


@dataclass(frozen=True, kw_only=True, eq=False)
class Person:
    """An identity with R reference photos, sorted by name.

    embeddings: (R, C) float32, not normalised.
    landmarks: (5, 2) float32 x y in pixels of the first photo. picture_size: its width and height in pixels.
    judged: embeddings by each of the other judges, (R, C), by its name.
    """

    name: str
    photos: tuple[Path, ...]
    embeddings: np.ndarray
    landmarks: np.ndarray
    picture_size: tuple[int, int]
    judged: dict[str, np.ndarray] = field(default_factory=dict)


def find_references(folder: Path) -> dict[str, list[Path]]:
    """Identities and their photos, by name: a folder of photos each, or files named after them with a number.

    Raises MagicMirrorError if there are none.
    """
    # <identity>/*.jpg, or <identity>.jpg, <identity>_1.jpg, ...
    found: dict[str, list[Path]] = {}
    for path in _files(folder, PHOTOS):
        parts = path.relative_to(folder).parts
        name = parts[0] if len(parts) > 1 else re.sub(_NUMBER, "", path.stem) or path.stem
        found.setdefault(name, []).append(path)
    if not found:
        raise MagicMirrorError(
            f"{folder} holds no reference photos: put them there as <identity>/*.jpg or <identity>_1.jpg "
            f"({', '.join(sorted(PHOTOS))})"
        )
    return found


def find_videos(folder: Path) -> list[Path]:
    """All videos in a folder and its sub-folders, by name. Raises MagicMirrorError if there are none."""
    videos = _files(folder, VIDEOS)
    if not videos:
        raise MagicMirrorError(
            f"{folder} holds no videos: put them there as <identity>*.mp4 or <identity>/*.mp4 "
            f"({', '.join(sorted(VIDEOS))})"
        )
    return videos


def identity_of(video: Path, root: Path, identities: list[str]) -> str:
    """The identity that a video shows: that of its sub-folder of `root`, else the longest that its name begins with.

    After the identity the name must end or go on with something other than a letter: "anna_1.mp4" is not of "ann".
    Raises MagicMirrorError if no identity fits.
    """
    for parent in video.relative_to(root).parts[:-1]:
        if parent in identities:
            return parent
    for name in sorted(identities, key=len, reverse=True):
        if video.stem.startswith(name) and not video.stem[len(name) :][:1].isalpha():
            return name
    raise MagicMirrorError(
        f"{video.name} belongs to no identity: begin its name with one of {', '.join(sorted(identities)[:10])}, "
        "or put it into a folder of that name"
    )


def load_person(analyzer: FaceAnalyzer, name: str, photos: list[Path], judges: Sequence[Judge] = ()) -> Person:
    """The largest face of each photo. Raises MagicMirrorError naming a photo that is damaged or shows no face."""
    images = [read_image(path) for path in photos]
    faces = [_largest(analyzer, path, image) for path, image in zip(photos, images)]
    return Person(
        name=name,
        photos=tuple(photos),
        embeddings=np.stack([face.embedding for face in faces]),
        landmarks=faces[0].landmarks,
        picture_size=(images[0].shape[1], images[0].shape[0]),
        judged={
            judge.name: np.stack([describe(judge, image, face) for image, face in zip(images, faces)])
            for judge in judges
        },
    )


def mean_face(analyzer: FaceAnalyzer, folder: Path) -> np.ndarray:
    """(C,) mean of the normalised embeddings of the largest face in each photo of a folder and its sub-folders."""
    photos = _files(folder, PHOTOS)
    if not photos:
        raise MagicMirrorError(f"{folder} holds no photos to centre on: put one photo each of many people there")
    return np.mean([_largest(analyzer, path, read_image(path)).normed_embedding for path in photos], axis=0)


def _largest(analyzer: FaceAnalyzer, path: Path, image: np.ndarray) -> Face:
    try:
        return select_face(find_faces(analyzer, image), "largest")
    except NoFaceError as error:
        raise NoFaceError(f"{path}: {error}, or take it out of the folder") from error


def _files(folder: Path, suffixes: set[str]) -> list[Path]:
    if not folder.is_dir():
        raise MagicMirrorError(f"the folder {folder} does not exist: make it, or give another one")
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes and path.is_file())
