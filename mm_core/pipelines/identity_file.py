"""The identity file, formats 1 and 2: what was found in a person's photos, without them; see docs/identity_file.md."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from ..checkpoints.safetensors_file import open_safetensors
from ..errors import CheckpointError
from ..faces.analysis import Face
from ..faces.references import MAX_WEIGHT, PhotoReport, Reference
from ..files import Numbered, write_bytes
from ..json_file import parse
from ..limits import REFERENCES
from ..models.id_encoder import FaceFeatures
from .identity import Identity

FORMAT = "magicmirror-identity"
PLAIN, WEIGHTED = "1", "2"
"""The versions. A file says 2 only where photos count differently, so that no older code takes them for equal."""
THUMBNAIL = "modelspec.thumbnail"
"""The key, by the ModelSpec metadata standard, of a model file's picture: ComfyUI's model library shows it."""
# Every tensor: its type, and its sizes after the first one, which is the number of photos. None: the encoder's size.
LAYOUT: dict[str, tuple[str, tuple[int | None, ...]]] = {
    "id_tokens": ("F32", (None, None)),
    "structure_tokens": ("F32", (None, None)),
    "embeddings": ("F32", (512,)),
    "boxes": ("F32", (4,)),
    "landmarks": ("F32", (5, 2)),
    "crops": ("U8", (224, 224, 3)),
}
_OWN_KEYS = ("encoder", "face_pack", "reports")
_NUMBERS = ("score", "size", "yaw", "pitch", "roll", "sharpness")  # of a face; a report repeats them
_AGAIN = "Extract the identity from the photos again"


@dataclass(frozen=True, kw_only=True)
class IdentityHeader:
    """The metadata of an identity file."""

    encoder: str
    """The fingerprint of the ID encoder, `IdentityEncoder.fingerprint`."""
    face_pack: str
    reports: tuple[PhotoReport, ...]
    """One for each photo."""
    weights: tuple[float, ...]
    """How much each photo counts, above 0."""


def save_identity(identity: Identity, target: Path | Numbered, *, metadata: Mapping[str, str] | None = None) -> Path:
    """Write an identity file, whole or not at all; returns where it is.

    Args:
        target: a path, whose file is replaced; or a `Numbered`, which replaces nothing.
        metadata: more for its header, such as ComfyUI's workflow.

    Raises:
        ValueError: an identity that does not say what made it, or without faces.
        MagicMirrorError: a disk that is full or cannot be written to.
    """
    if not identity.references or identity.encoder is None or identity.face_pack is None:
        raise ValueError("an identity is saved with its faces, ID encoder and face pack: see MagicMirror.identity")
    faces = [reference.face for reference in identity.references]
    tensors = {
        "id_tokens": identity.features.id_tokens,
        "structure_tokens": identity.features.structure_tokens,
        "embeddings": _stacked([face.embedding for face in faces]),
        "boxes": _stacked([face.box for face in faces]),
        "landmarks": _stacked([face.landmarks for face in faces]),
        "crops": torch.from_numpy(identity.crops),
    }
    header = {
        **(metadata or {}),
        "format": FORMAT,
        "format_version": PLAIN if identity.weights is None else WEIGHTED,
        "encoder": identity.encoder,
        "face_pack": identity.face_pack,
        "reports": json.dumps([dataclasses.asdict(reference.report) for reference in identity.references]),
        THUMBNAIL: _as_jpeg(identity.references[0].crop),
    }
    if identity.weights is not None:
        header["weights"] = json.dumps([float(reference.weight) for reference in identity.references])
    # Not save_file: it writes a temporary file of its own, which a killed process leaves behind.
    write_bytes(target, save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata=header))
    return target.path if isinstance(target, Numbered) else target


def load_identity(path: Path, *, encoder: str) -> Identity:
    """Read an identity file, strictly. encoder: the fingerprint of the one that it has to be made by.

    Raises:
        CheckpointError: the file is missing, damaged, no identity, of another version, or made by another encoder.
    """
    with open_safetensors(path) as file:
        header = _parse_header(path, file.metadata() or {})
        if header.encoder != encoder:
            raise CheckpointError(
                f"{path.name} was made with another ID encoder: fingerprint {header.encoder[:16]}, the model's is "
                f"{encoder[:16]}. {_AGAIN} with this model, or choose the ID encoder that made the file."
            )
        tensors = _read_tensors(path, file, len(header.reports))
    return Identity(
        features=FaceFeatures(id_tokens=tensors["id_tokens"], structure_tokens=tensors["structure_tokens"]),
        references=tuple(_reference(header, tensors, row) for row in range(len(header.reports))),
        encoder=header.encoder,
        face_pack=header.face_pack,
    )


def _stacked(arrays: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.asarray(arrays, dtype=np.float32))


def _as_jpeg(crop: np.ndarray) -> str:
    """A small picture as a data URL."""
    content = io.BytesIO()
    Image.fromarray(crop).save(content, format="JPEG")
    return "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode("ascii")


def _reference(header: IdentityHeader, tensors: Mapping[str, Tensor], row: int) -> Reference:
    report = header.reports[row]
    face = Face(
        box=tensors["boxes"][row].numpy(),
        landmarks=tensors["landmarks"][row].numpy(),
        embedding=tensors["embeddings"][row].numpy(),
        **{name: vars(report)[name] for name in _NUMBERS},
    )
    return Reference(face=face, crop=tensors["crops"][row].numpy(), report=report, weight=header.weights[row])


def _read_tensors(path: Path, file: Any, photos: int) -> dict[str, Tensor]:
    """The tensors of LAYOUT, each of the right type, shape and finite; raises CheckpointError."""
    names = set(file.keys())
    if names != LAYOUT.keys():
        missing, unexpected = sorted(LAYOUT.keys() - names), sorted(names - LAYOUT.keys())
        raise CheckpointError(
            f"{path.name} does not hold the tensors of an identity: missing {', '.join(missing) or 'none'}, unexpected "
            f"{', '.join(unexpected) or 'none'}. {_AGAIN}."
        )
    tensors = {}
    for name, (kind, sizes) in LAYOUT.items():
        found = file.get_slice(name)
        shape = tuple(found.get_shape())
        fits = [wanted in (None, size) and size > 0 for wanted, size in zip((photos, *sizes), shape, strict=False)]
        if found.get_dtype() != kind or len(shape) != len(sizes) + 1 or not all(fits):
            wanted = ", ".join("any" if size is None else str(size) for size in (photos, *sizes))
            raise CheckpointError(
                f"{path.name}: {name} is {found.get_dtype()} of {shape}; it must be {kind} of ({wanted}). {_AGAIN}."
            )
        try:
            # A copy: what safetensors gives may be the file itself, which may be replaced while this is kept.
            tensors[name] = file.get_tensor(name).clone()
        except SafetensorError as error:
            raise CheckpointError(f"{path.name} is damaged: {name} cannot be read ({error}). {_AGAIN}.") from error
        if kind == "F32" and not tensors[name].isfinite().all():
            raise CheckpointError(f"{path.name} is damaged: {name} holds values that are no numbers. {_AGAIN}.")
    return tensors


def _parse_header(path: Path, metadata: Mapping[str, str]) -> IdentityHeader:
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{path.name} is not a Magic Mirror identity: its metadata says format={metadata.get('format')!r}, not "
            f"{FORMAT!r}. Choose a file that Save Identity wrote."
        )
    version = metadata.get("format_version")
    if version not in (PLAIN, WEIGHTED):
        raise CheckpointError(
            f"{path.name} has format version {version!r}; this code reads versions {PLAIN!r} and {WEIGHTED!r}. "
            f"Update the node pack. {_AGAIN} if you cannot."
        )
    own = _OWN_KEYS if version == PLAIN else (*_OWN_KEYS, "weights")
    missing = [key for key in own if key not in metadata]
    if missing:
        raise CheckpointError(f"{path.name} lacks the metadata {', '.join(missing)}. {_AGAIN}.")
    try:
        found = parse(metadata["reports"], "the text")
        if not isinstance(found, list) or len(found) > REFERENCES:
            raise ValueError(f"it must be a list of 1 to {REFERENCES} reports, one for each photo")
        if not found:
            raise ValueError("there is none")
        reports = tuple(_parse_report(values) for values in found)
    except (ValueError, TypeError, CheckpointError) as error:
        raise CheckpointError(f"{path.name}: its metadata `reports` is wrong: {error}. {_AGAIN}.") from error
    weights = (1.0,) * len(reports) if version == PLAIN else _parse_weights(path, metadata["weights"], len(reports))
    return IdentityHeader(
        encoder=metadata["encoder"], face_pack=metadata["face_pack"], reports=reports, weights=weights
    )


def _parse_weights(path: Path, text: str, photos: int) -> tuple[float, ...]:
    try:
        weights = parse(text, "weights")
    except CheckpointError:
        weights = None
    fits = isinstance(weights, list) and len(weights) == photos
    if not fits or not all(type(weight) is float and 0 < weight <= MAX_WEIGHT for weight in weights):
        raise CheckpointError(
            f"{path.name}: its metadata `weights` is {text[:100]}; it must be {photos} numbers above 0, at most "
            f"{MAX_WEIGHT:g}. {_AGAIN}."
        )
    return tuple(weights)


def _parse_report(values: Any) -> PhotoReport:
    """A report from its JSON. Raises ValueError where a field is missing, unexpected, or of another kind."""
    names = {field.name for field in dataclasses.fields(PhotoReport)}
    if not isinstance(values, dict) or values.keys() != names:
        raise ValueError(f"a report must have exactly the fields {', '.join(sorted(names))}")
    similarity, warnings = values["similarity"], values["warnings"]
    numbers = [values[name] for name in _NUMBERS] + ([] if similarity is None else [similarity])
    if not all(type(number) is float and math.isfinite(number) for number in numbers):
        raise ValueError(f"{', '.join(_NUMBERS)} and similarity must be finite numbers, not {numbers}")
    if type(values["faces_seen"]) is not int or values["faces_seen"] < 1:
        raise ValueError(f"faces_seen is {values['faces_seen']!r}; it must be a number from 1")
    if not isinstance(warnings, list) or not all(isinstance(text, str) for text in [values["name"], *warnings]):
        raise ValueError("name and warnings must be text")
    return PhotoReport(**values | {"warnings": tuple(warnings)})
