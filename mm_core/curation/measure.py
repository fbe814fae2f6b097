"""What is measured of pictures and pairs, whatever is then decided by it: a row of plain values for each item."""

from __future__ import annotations

import base64
import hashlib
import io
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import CheckpointError, MagicMirrorError
from ..faces.analysis import Face, FaceAnalyzer, select_face
from ..faces.tracking import find_faces
from ..picture_file import decode_image
from .config import Measuring
from .items import Item, read
from .text import TextReader

Row = dict[str, Any]
HASH_SIDE = 16
"""Of a perceptual hash: 16 x 16 bits."""
_ASK = "Describe the person in this picture, and what they do, in one sentence."
_CAPTION_TOKENS = 80
_ID_DIGITS = 20


class Measurer:
    """The models of a worker, loaded when they are first used.

    seconds: of a core, by stage: the time of all threads of the process.

    Raises CheckpointError for models that are missing or damaged.
    """

    def __init__(self, settings: Measuring) -> None:
        self.settings = settings
        self.seconds: Counter[str] = Counter()
        self.analyzer = FaceAnalyzer(Path(settings.insightface_root).expanduser(), settings.face_pack)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        began = time.process_time()
        try:
            yield
        finally:
            self.seconds[name] += time.process_time() - began

    def picture(self, item: Item, *, recognise: bool = False) -> Row:
        """`measured` of a picture, with what is said of it, or why it cannot be read."""
        row = said_of(item)
        try:
            with self.stage("read"):
                content = item.read()
                row["id"] = content_id(content)
                image = decode_image(io.BytesIO(content), item.name)
        except MagicMirrorError as error:
            return row | {"error": ["unreadable", str(error)]}
        return row | self.measured(image, recognise) | self.by_models(image, row["caption"])

    def pair(self, item: Item) -> Row:
        """`picture`, with the faces of its reference, the cosine between both, and the reference's embedding."""
        row = self.picture(item, recognise=True)
        try:
            with self.stage("read"):
                content = read(item.reference, f"The reference of {item.name}")
                reference = decode_image(io.BytesIO(content), f"{item.name}, reference")
        except MagicMirrorError as error:
            return row | {"error": row.get("error") or ["reference", str(error)]}
        with self.stage("faces"):
            faces = find_faces(self.analyzer, reference)
        if not faces:
            return row | {"error": row.get("error") or ["reference", "no face was found in the reference"]}
        face = select_face(faces, "largest")
        row |= {"reference": content_id(content) + item.reference_suffix, "identity": packed(face.normed_embedding)}
        if row.get("embedding"):
            row["cosine"] = number(unpacked(row["embedding"]) @ face.normed_embedding)
        return row

    def measured(self, image: np.ndarray, recognise: bool) -> Row:
        """Size, perceptual hash, share of text, and the faces, the largest first. image: (H, W, 3) uint8 RGB."""
        with self.stage("hash"):
            hashed = perceptual_hash(image)
        with self.stage("faces"):
            faces = sorted(find_faces(self.analyzer, image, recognise), key=lambda face: -face.size)
        row: Row = {"size": [image.shape[1], image.shape[0]], "hash": hashed, "looks": [[face_row(f) for f in faces]]}
        if faces:  # else it is dropped, whatever is written on it
            row["text"] = self.text(image)
        if recognise and faces:
            row["embedding"] = packed(faces[0].normed_embedding)
        return row

    def text(self, image: np.ndarray) -> float:
        """Percent of a picture that text covers."""
        with self.stage("text"):
            return number(self._reader.share(image))

    def by_models(self, image: np.ndarray, caption: str | None) -> Row:
        """What a classifier thinks of a picture, and a captioner where there is no caption; as far as they are set."""
        row: Row = {}
        if self.settings.safety is not None:
            with self.stage("safety"):
                found = self._classifier(Image.fromarray(image), top_k=None)
                row["labels"] = {each["label"]: number(each["score"]) for each in found}
        if caption is None and self.settings.captioner is not None:
            with self.stage("caption"):
                row["caption"] = self._described(Image.fromarray(image))
        return row

    def _described(self, image: Image.Image) -> str:
        asked = [{"type": "image", "image": image}, {"type": "text", "text": _ASK}]
        answer = self._captioner(
            text=[{"role": "user", "content": asked}], max_new_tokens=_CAPTION_TOKENS, return_full_text=False
        )
        return answer[0]["generated_text"].strip()

    @cached_property
    def _reader(self) -> TextReader:
        return TextReader()

    @cached_property
    def _captioner(self) -> Any:
        return _pipeline("image-text-to-text", self.settings.captioner)

    @cached_property
    def _classifier(self) -> Any:
        return _pipeline("image-classification", self.settings.safety)


def said_of(item: Item) -> Row:
    """Its name and what comes with it."""
    return {"name": item.name, "suffix": item.suffix} | {
        what: item.said(what) for what in ("caption", "source", "licence")
    }


def face_row(face: Face) -> Row:
    return {name: number(getattr(face, name)) for name in ("score", "size", "yaw", "pitch", "roll", "sharpness")}


def perceptual_hash(image: np.ndarray) -> str:
    """256 bits, as hexadecimal digits. image: (H, W, 3) uint8 RGB."""
    import imagehash

    return str(imagehash.phash(Image.fromarray(image), HASH_SIDE))


def content_id(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:_ID_DIGITS]


def file_id(path: Path) -> str:
    """`content_id` of a file of any size."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()[:_ID_DIGITS]


def packed(embedding: np.ndarray) -> str:
    """An embedding as text: float16, which moves a cosine by .0005."""
    return base64.b64encode(embedding.astype("<f2").tobytes()).decode()


def unpacked(text: str) -> np.ndarray:
    """(512,) float32 of length 1."""
    embedding = np.frombuffer(base64.b64decode(text), "<f2").astype(np.float32)
    return embedding / np.linalg.norm(embedding)


def number(value: float) -> float:
    return round(float(value), 4)


def _pipeline(task: str, folder: str) -> Any:
    """A model of transformers from a local folder, safetensors only, without code of its own."""
    from transformers import pipeline

    path = Path(folder).expanduser()
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path} holds no model: there is no config.json. Download the whole folder of a model.")
    try:
        # A folder that has a config.json is never looked up elsewhere.
        return pipeline(task, model=str(path), trust_remote_code=False, model_kwargs={"use_safetensors": True})
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be used for {task}: {error}. Choose a model for it.") from error


def spread(values: Sequence[float], count: int) -> list[int]:
    """Indices of at most `count` values, far from each other: the middle one first, then always the one farthest from
    those that are chosen."""
    if not len(values):
        return []
    array = np.asarray(values, np.float64)
    chosen = [int(np.argmin(abs(array)))]
    while len(chosen) < min(count, len(array)):
        distance = abs(array[:, None] - array[chosen]).min(1)
        if distance.max() <= 0:
            break
        chosen.append(int(distance.argmax()))
    return chosen
