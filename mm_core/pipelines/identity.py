"""From photographs to an identity: faces found, cropped and encoded, once per person."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..checkpoints.photomaker import FILE_NAME, REPO, load_id_encoder, read_fingerprint
from ..errors import CheckpointError
from ..faces.references import Reference
from ..memory import Part, Residence
from ..models.id_encoder import FaceFeatures, IDEncoder
from .disk_cache import DiskCache, cache_key

_FINGERPRINT = "fingerprint"


@dataclass(frozen=True, kw_only=True)
class Identity:
    """One person, from one or more photos. Everything is on the CPU, in float32."""

    features: FaceFeatures
    references: tuple[Reference, ...]
    encoder: str | None = None
    """The fingerprint of the ID encoder that made the features; None if it is not known."""
    face_pack: str | None = None
    """The name of the face models that made the references' embeddings; None if it is not known."""

    @property
    def weights(self) -> Tensor | None:
        """(R,) how much each photo counts, the largest 1; None where all count the same.

        So with a weight that goes to 0 the identity becomes the one without that photo.
        """
        weights = [reference.weight for reference in self.references]
        if len(set(weights)) < 2:
            return None
        return torch.tensor([weight / max(weights) for weight in weights])

    @property
    def id_tokens(self) -> Tensor:
        """`x_id`, the weighted mean over the references: (1, N, c)."""
        tokens, weights = self.features.id_tokens, self.weights
        if weights is None:
            return tokens.mean(dim=0, keepdim=True)
        return (tokens * weights[:, None, None]).sum(dim=0, keepdim=True) / weights.sum()

    @property
    def report(self) -> str:
        """What will hurt the likeness, what was found in each photo, and how much each counts if that differs."""
        reports = [reference.report for reference in self.references]
        lines = [*(line for report in reports for line in report.warned), *(report.summary for report in reports)]
        if self.weights is not None:
            parts = self.weights / self.weights.sum()
            shares = (f"{r.report.name} {part:.0%}" for r, part in zip(self.references, parts.tolist(), strict=True))
            lines.append(f"weights: {', '.join(shares)}")
        return "\n".join(lines)

    @property
    def crops(self) -> np.ndarray:
        """(R, 224, 224, 3) uint8 RGB, what the ViT saw."""
        return np.stack([reference.crop for reference in self.references])


@torch.no_grad()
def encode_identity(references: Sequence[Reference], encoder: IDEncoder, device: torch.device) -> Identity:
    """Run the frozen encoder, which is on the device, and bring the result back."""
    crops = np.stack([reference.crop for reference in references])
    pixels = torch.from_numpy(crops).permute(0, 3, 1, 2).float() / 255  # (R, 3, 224, 224)
    embeddings = torch.from_numpy(np.stack([reference.face.embedding for reference in references]))
    features = encoder(pixels.to(device), embeddings.to(device))
    features = FaceFeatures(*(tensor.float().cpu() for tensor in features))
    return Identity(features=features, references=tuple(references))


class IdentityEncoder:
    """The frozen ID encoder, PhotoMaker-V2's or one of another size, read when it is first needed.

    Args:
        path: its file; None where none was chosen, which is an error only when it is needed.
        cache: for the features of photos.
    """

    def __init__(
        self, path: Path | None, dtype: torch.dtype, residence: Residence, cache: DiskCache | None = None
    ) -> None:
        self._path, self._dtype, self._residence, self._cache = path, dtype, residence, cache

    @cached_property
    def module(self) -> IDEncoder:
        """The encoder. Raises CheckpointError without a file."""
        return load_id_encoder(self._chosen(), dtype=self._dtype)

    @cached_property
    def _part(self) -> Part:
        return self._residence.part("id_encoder", [self.module])

    @cached_property
    def fingerprint(self) -> str:
        """A hash of its weights, the same at every precision. Raises CheckpointError without a file."""
        return read_fingerprint(self._chosen())

    def identity(self, references: Sequence[Reference], face_pack: str | None = None) -> Identity:
        """Encode photos of one person; see `faces.references.analyse_references`.

        face_pack: the name of the face models that found them; an identity file tells it.
        """
        key = None
        if self._cache is not None:
            seen = [(reference.crop.tobytes(), reference.face.embedding.tobytes()) for reference in references]
            key = cache_key([self._chosen()], "identity", self._dtype, seen)
            found = self._cache.get(key)
            if found is not None:
                vars(self)["fingerprint"] = bytes(found.pop(_FINGERPRINT).tolist()).decode()
                identity = Identity(features=FaceFeatures(**found), references=tuple(references))
                return replace(identity, encoder=self.fingerprint, face_pack=face_pack)
        with self._part.ready():
            identity = encode_identity(references, self.module, self._part.device)
        if key is not None:
            fingerprint = torch.tensor(list(self.fingerprint.encode()), dtype=torch.uint8)
            self._cache.put(key, identity.features._asdict() | {_FINGERPRINT: fingerprint})
        return replace(identity, encoder=self.fingerprint, face_pack=face_pack)

    def unload(self) -> None:
        """Let go of the weights."""
        vars(self).pop("_part", None)
        vars(self).pop("module", None)

    def _chosen(self) -> Path:
        if self._path is None:
            raise CheckpointError(f"No ID encoder was chosen. It is {FILE_NAME} of https://huggingface.co/{REPO}.")
        return self._path
