"""The frozen models, and what they make of prompts, pictures of people, and samples: rows of tensors."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..checkpoints.photomaker import load_id_encoder, read_id_encoder_config
from ..errors import MagicMirrorError, NoFaceError, PromptError, SampleError
from ..faces.analysis import Face, FaceAnalyzer
from ..faces.references import Reference, analyse_references
from ..faces.tracking import find_faces, follow
from ..memory import compute_dtype, default_device
from ..models.id_encoder import IDEncoderConfig
from ..pipelines.base import BaseModel
from ..pipelines.named import FETCH
from ..pipelines.presets import TEMPORAL_COMPRESSION, latent_shape
from ..pipelines.prompt import IdentityTokens, identity_tokens
from .features import FORMAT
from .framing import check_size, place
from .manifest import Sample, check_length, read_media, read_picture

FACE_EVERY = TEMPORAL_COMPRESSION
"""Faces are looked for in the first frame and then once per latent frame; between, boxes and landmarks are linear."""
MIN_SEEN = 0.5
"""Part of those frames that must show a face: a head that turns away is motion that is wanted."""
_BATCH = 8
_BATCH_PIXELS = _BATCH * 480 * 720  # the VAE's; a clip of 49 frames is encoded alone


@dataclass(frozen=True, kw_only=True)
class FeatureSettings:
    """What is precomputed, by which models."""

    data: Path
    """Folder of the data set, or another manifest in it."""
    width: int
    height: int
    frames: int
    base: BaseModel
    id_encoder: Path
    face_models: Path
    """The folder that holds `models`, and in there the face pack."""
    face_pack: str

    @cached_property
    def id_encoder_config(self) -> IDEncoderConfig:
        return read_id_encoder_config(self.id_encoder)

    def tokens(self, caption: str) -> IdentityTokens:
        """Raises PromptError: no identity word, or one too late in the caption."""
        length = self.base.transformer_config["max_text_seq_length"]
        slots = self.id_encoder_config.num_id_tokens
        return identity_tokens(self.base.tokenizer, caption, num_slots=slots, max_length=length)

    def to_json(self, manifest: Path) -> dict[str, Any]:
        """Everything that the features depend on, beside the weights."""
        return {
            "format": FORMAT,
            "base": self.base.name,
            "manifest": hashlib.sha256(manifest.read_bytes()).hexdigest(),
            "width": self.width,
            "height": self.height,
            "frames": self.frames,
            "face_pack": self.face_pack,
            "face_every": FACE_EVERY,
            "min_seen": MIN_SEEN,
            "id_encoder": asdict(self.id_encoder_config),
        }

    def bytes_of_items(self) -> dict[str, int]:
        """Of a prompt, a reference and a sample."""
        transformer, encoder = self.base.transformer_config, self.id_encoder_config
        latents = latent_shape(self.base.vae_config, frames=self.frames, height=self.height, width=self.width)
        image_tokens = (encoder.clip_image_size // encoder.clip_patch_size) ** 2 + 1
        reference = 2 * image_tokens * encoder.clip_hidden_size + 2 * encoder.num_id_tokens * encoder.id_token_dim
        return {
            "prompts": 2 * transformer["max_text_seq_length"] * transformer["text_embed_dim"],
            "references": reference + 4 * encoder.id_embedding_dim,
            "samples": 2 * math.prod(latents) + 4 * 14 * self.frames + latents[1],
        }


@dataclass(frozen=True, kw_only=True)
class _Clip:
    """A sample's picture or clip of F frames, at the size that is trained."""

    frames: np.ndarray
    """(F, H, W, 3) uint8."""
    boxes: np.ndarray
    """(F, 4) float32, pixels."""
    landmarks: np.ndarray
    """(F, 5, 2) float32, pixels."""
    seen: np.ndarray
    """(F',) bool, for each frame that is looked at, whether a face was found."""
    padded: bool
    """Whether it got black borders."""


class FrozenModels:
    """The frozen models, and what they make of one shard."""

    def __init__(self, settings: FeatureSettings, data: Path) -> None:
        self.settings, self.base, self.data = settings, settings.base, data
        self.size, self.frames = (settings.width, settings.height), settings.frames
        self.device = default_device()
        dtype = compute_dtype("auto", self.device)
        self.encoder = load_id_encoder(settings.id_encoder, dtype=dtype)
        self.analyzer = FaceAnalyzer(settings.face_models, settings.face_pack, fetch=FETCH)
        self.vae, self.text_encoder = self.base.load_vae(dtype), self.base.load_text_encoder(dtype)

    @property
    def modules(self) -> list[nn.Module]:
        return [self.vae, self.text_encoder, self.encoder]

    def fingerprint(self) -> str:
        """SHA-256 of all frozen weights."""
        digest = hashlib.sha256()
        for module in self.modules:
            for name, tensor in sorted(module.state_dict().items()):
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy())
            digest.update(str(getattr(module.config, "scaling_factor", "")).encode())
        return digest.hexdigest()

    def prompt_shard(self, captions: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors by name, a row for each usable caption, and the header: the captions of the rows, what was left out.

        The empty caption is the empty prompt, as CogVideoXPipeline reads it; it has no place for an identity.
        """
        found: dict[str, tuple[list[int], list[int]]] = {}
        skipped = {}
        for caption in captions:
            try:
                found[caption] = self._tokens(caption)
            except PromptError as error:
                skipped[caption] = ["caption", str(error)]
        ids = [ids for ids, _ in found.values()]
        tensors = _joined([self._encode_prompts(ids[i : i + _BATCH]) for i in range(0, len(ids), _BATCH)])
        if found:
            tensors["slots"] = torch.tensor([slots for _, slots in found.values()])  # (n, N)
        return tensors, {"rows": list(found), "skipped": skipped}

    def _tokens(self, caption: str) -> tuple[list[int], list[int]]:
        """Of the text encoder, and where the identity goes. Raises PromptError."""
        if caption:
            tokens = self.settings.tokens(caption)
            return list(tokens.ids), list(tokens.slots)
        length = self.base.transformer_config["max_text_seq_length"]
        ids = self.base.tokenizer("", padding="max_length", max_length=length, truncation=True)["input_ids"]
        return ids, [0] * self.settings.id_encoder_config.num_id_tokens

    def reference_shard(self, paths: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """As `prompt_shard`, with the pictures' paths."""
        found: dict[str, Reference] = {}
        skipped = {}
        for path in paths:
            try:
                picture = read_picture(self.data, path)
                found[path] = analyse_references(self.analyzer, [picture], names=[path])[0]
            except NoFaceError as error:
                skipped[path] = ["no face in a reference", str(error)]
            except SampleError as error:
                skipped[path] = [error.kind, str(error)]
        references = list(found.values())
        parts = [self._encode_references(references[i : i + _BATCH]) for i in range(0, len(references), _BATCH)]
        return _joined(parts), {"rows": list(found), "skipped": skipped}

    def _encode_references(self, references: list[Reference]) -> dict[str, Tensor]:
        crops = np.stack([reference.crop for reference in references])
        pixels = torch.from_numpy(crops).permute(0, 3, 1, 2).float() / 255  # (n, 3, 224, 224)
        embeddings = torch.from_numpy(np.stack([reference.face.embedding for reference in references]))
        features = self.encoder(pixels.to(self.device), embeddings.to(self.device))
        return {
            "id_tokens": _half(features.id_tokens, "the ID tokens"),  # (n, N, c)
            "structure_tokens": _half(features.structure_tokens, "the structure tokens"),  # (n, S, clip)
            "embedding": embeddings.float(),  # (n, 512)
        }

    def sample_shard(self, samples: Sequence[Sample]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """As `prompt_shard`, with the samples' ids, and those that got black borders."""
        found: dict[str, _Clip] = {}
        skipped = {}
        for sample in samples:
            try:
                found[sample.id] = self._read(sample)
            except SampleError as error:
                skipped[sample.id] = [error.kind, str(error)]
        read = list(found.values())
        size = max(1, min(_BATCH, _BATCH_PIXELS // (self.frames * self.size[0] * self.size[1])))
        frames = [clip.frames for clip in read]
        tensors = _joined([self._encode_clips(frames[i : i + size]) for i in range(0, len(read), size)])
        if read:
            for name in ("boxes", "landmarks", "seen"):
                tensors[name] = torch.from_numpy(np.stack([getattr(clip, name) for clip in read]))
        padded = [name for name, clip in found.items() if clip.padded]
        return tensors, {"rows": list(found), "skipped": skipped, "padded": padded}

    def _read(self, sample: Sample) -> _Clip:
        try:
            self._tokens(sample.caption)
        except PromptError as error:
            raise SampleError("caption", str(error)) from error
        if not sample.caption:
            raise SampleError("no caption", f"the caption of {sample.id} is empty; say what is seen")
        media = read_media(self.data, sample.media, self.frames)
        check_length(len(media), self.frames, sample.media)
        check_size(media.shape[2], media.shape[1], *self.size, sample.media)
        looked_at = range(0, len(media), FACE_EVERY)
        faces = self._faces(media, looked_at, sample.media)
        at, known = zip(*((number, face) for number, face in zip(looked_at, faces) if face is not None))
        boxes, landmarks = (np.stack([getattr(face, name) for face in known]) for name in ("box", "landmarks"))
        placement = place((media.shape[2], media.shape[1]), self.size, boxes, sample.media)
        corners = placement.moved(boxes.reshape(-1, 2, 2)).reshape(-1, 4)
        return _Clip(
            frames=placement.applied(media, *self.size),
            boxes=between(corners, at, len(media)),
            landmarks=between(placement.moved(landmarks), at, len(media)),
            seen=np.array([face is not None for face in faces]),
            padded=max(placement.left, placement.top) > 0,
        )

    def _faces(self, frames: np.ndarray, looked_at: Sequence[int], name: str) -> list[Face | None]:
        """The person's face in each frame that is looked at, None where none is found: a head may turn away."""
        faces: list[Face | None] = []
        last = None
        for number in looked_at:
            face = follow(find_faces(self.analyzer, frames[number], recognise=False), last)
            faces.append(face)
            last = face or last
        count = len(faces) - faces.count(None)
        if count < MIN_SEEN * len(faces):
            kind = "face seen too rarely" if count else "no face in the clip"
            raise SampleError(kind, f"{name} shows a face in {count} of the {len(faces)} frames that are looked at")
        return faces

    def _encode_clips(self, clips: list[np.ndarray]) -> dict[str, Tensor]:
        pixels = torch.from_numpy(np.stack(clips)).to(self.device).permute(0, 4, 1, 2, 3)  # (n, 3, F, H, W)
        latents = self.vae.encode((pixels.float() / 127.5 - 1).to(self.vae.dtype)).latent_dist.mode()
        # `invert_scale_latents` of CogVideoX 1.5 is about image-to-video's picture; clips are multiplied everywhere.
        latents = latents.float() * self.vae.config.scaling_factor
        return {"latents": _half(latents.permute(0, 2, 1, 3, 4), "the latents")}  # (n, F', C, H', W')

    def _encode_prompts(self, ids: list[list[int]]) -> dict[str, Tensor]:
        embeds = self.text_encoder(torch.tensor(ids, device=self.device))[0]
        return {"prompt_embeds": _half(embeds, "the prompts' embeddings")}  # (n, T, Dtxt)


def between(values: np.ndarray, at: Sequence[int], frames: int) -> np.ndarray:
    """Values (n, ...) at n of the frames -> (frames, ...) float32, linear between them, constant after the last."""
    rows = values.reshape(len(values), -1)
    filled = [np.interp(np.arange(frames), at, column) for column in rows.T]
    return np.stack(filled, axis=1).reshape(frames, *values.shape[1:]).astype(np.float32)


def _half(tensor: Tensor, what: str) -> Tensor:
    """float16 on the CPU. What the frozen models make is far inside its range; if not, something is broken."""
    half = tensor.to("cpu", torch.float16)
    if not half.isfinite().all():
        raise MagicMirrorError(
            f"{what} are not finite in float16 (largest value {tensor.abs().max():g}). The weights may be damaged, or "
            "overflow in the precision of this device: use one that computes in bfloat16 or float32."
        )
    return half.contiguous()


def _joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]} if parts else {}
