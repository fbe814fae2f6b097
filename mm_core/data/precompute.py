"""What the frozen models make of a data set, once, before training: latents, prompts, faces, identities.

A sample that cannot be used is left out, counted by reason; nothing is replaced. Work is done in shards of
SAMPLES_PER_SHARD lines of the manifest, each written whole; a run that was killed goes on after the last one.
`features.Features` reads the result and says what is in it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn

from ..checkpoints.photomaker import load_id_encoder, read_id_encoder_config
from ..errors import CheckpointError, MagicMirrorError, NoFaceError, PromptError, SampleError, SettingError
from ..faces.analysis import Face, FaceAnalyzer
from ..faces.references import Reference, analyse_references
from ..faces.tracking import find_faces, follow
from ..files import PARTIAL, atomic_write, write_json
from ..json_file import read_object
from ..memory import compute_dtype, default_device, on_device
from ..models.id_encoder import IDEncoderConfig
from ..pipelines.base import BaseModel
from ..pipelines.prompt import IdentityTokens, identity_tokens
from .features import EMPTY, FORMAT, INDEX, ROWS, SETTINGS, header_of, shard_name
from .manifest import Sample, check_length, fit, manifest_path, read_manifest, read_media, read_picture

SAMPLES_PER_SHARD = 64
FACE_EVERY = 4
"""Faces are looked for in the first frame and then once per latent frame; between, boxes and landmarks are linear."""
_BATCH = 8
_BATCH_PIXELS = _BATCH * 480 * 720  # the VAE's; a clip of 49 frames is encoded alone

Progress = Callable[[str, int, int], None]
"""What is being made ("references", "samples"), how many of it are done, and of how many."""


@dataclass(frozen=True, kw_only=True)
class Source:
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


def precompute(source: Source, folder: Path, on_progress: Progress = lambda what, done, of: None) -> None:
    """Write the features of a data set into a folder, or the rest of them. One run at a time in a folder.

    Raises:
        SettingError: no manifest, a wrong line in it, or a folder with features made by other settings or weights.
        MagicMirrorError: the disk is full or will be; not one sample can be used; a value that is not finite.
        CheckpointError: missing or damaged models.
    """
    manifest = manifest_path(source.data)
    samples = read_manifest(manifest)
    references = list(dict.fromkeys(path for sample in samples for path in sample.references))
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for left_by_a_killed_run in folder.glob(f".*{PARTIAL}"):
        left_by_a_killed_run.unlink()
    wanted = _settings(source, manifest)
    _check_settings(folder, wanted)
    _check_space(folder, source, len(samples), len(references))

    maker = _Maker(source, manifest.parent)
    wanted["weights"] = maker.fingerprint()
    _check_settings(folder, wanted)
    with _writing(folder):
        write_json(folder / SETTINGS, wanted)
    with on_device(maker.modules, maker.device), torch.no_grad():
        if not (folder / EMPTY).is_file():
            _write(folder / EMPTY, {"prompt_embeds": maker.empty_prompt()}, {})
        for kind, items, make in (
            ("references", references, maker.reference_shard),
            ("samples", samples, maker.sample_shard),
        ):
            for number, first in enumerate(range(0, len(items), SAMPLES_PER_SHARD)):
                path = folder / shard_name(kind, number)
                if not path.is_file():
                    _write(path, *make(items[first : first + SAMPLES_PER_SHARD]))
                on_progress(kind, min(first + SAMPLES_PER_SHARD, len(items)), len(items))
    index = _index(folder, samples, references, wanted)
    with _writing(folder):
        write_json(folder / INDEX, index)


class _Maker:
    """The frozen models, and what they make of one shard."""

    def __init__(self, source: Source, data: Path) -> None:
        self.source, self.base, self.data = source, source.base, data
        self.size, self.frames = (source.width, source.height), source.frames
        self.device = default_device()
        dtype = compute_dtype("auto", self.device)
        self.encoder = load_id_encoder(source.id_encoder, dtype=dtype)
        self.analyzer = FaceAnalyzer(source.face_models, source.face_pack)
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

    def empty_prompt(self) -> Tensor:
        """(1, T, Dtxt) of the empty prompt, as CogVideoXPipeline reads it."""
        length = self.base.transformer_config["max_text_seq_length"]
        ids = self.base.tokenizer("", padding="max_length", max_length=length, truncation=True)["input_ids"]
        return _half(self.text_encoder(torch.tensor([ids], device=self.device))[0], "the empty prompt")

    def reference_shard(self, paths: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors by name, a row for each usable picture, and the header: the paths of the rows, what was left out."""
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
        """As `reference_shard`, with the samples' ids."""
        found, skipped = {}, {}
        for sample in samples:
            try:
                found[sample.id] = self._read(sample)
            except SampleError as error:
                skipped[sample.id] = [error.kind, str(error)]
        read = list(found.values())
        size = max(1, min(_BATCH, _BATCH_PIXELS // (self.frames * self.size[0] * self.size[1])))
        latents = [self._encode_clips([clip for clip, *_ in read[i : i + size]]) for i in range(0, len(read), size)]
        prompts = [
            self._encode_prompts([t.ids for _, t, *_ in read[i : i + _BATCH]]) for i in range(0, len(read), _BATCH)
        ]
        tensors = _joined(latents) | _joined(prompts)
        if read:
            tensors["slots"] = torch.tensor([tokens.slots for _, tokens, *_ in read])  # (n, N)
            tensors["boxes"] = torch.from_numpy(np.stack([boxes for *_, boxes, _ in read]))  # (n, F, 4)
            tensors["landmarks"] = torch.from_numpy(np.stack([points for *_, points in read]))  # (n, F, 5, 2)
        return tensors, {"rows": list(found), "skipped": skipped}

    def _read(self, sample: Sample) -> tuple[np.ndarray, IdentityTokens, np.ndarray, np.ndarray]:
        """Frames (F, H, W, 3) uint8, the prompt's tokens, boxes (F, 4), landmarks (F, 5, 2)."""
        try:
            tokens = self.source.tokens(sample.caption)
        except PromptError as error:
            raise SampleError("caption" if sample.caption else "no caption", str(error)) from error
        media = read_media(self.data, sample.media, self.frames)
        check_length(len(media), self.frames, sample.media)
        frames = fit(media, *self.size, sample.media)
        return frames, tokens, *self._faces(frames, sample.media)

    def _faces(self, frames: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(F, 4) boxes and (F, 5, 2) landmarks, float32 pixels."""
        looked_at = range(0, len(frames), FACE_EVERY)
        faces: list[Face] = []
        for number in looked_at:
            face = follow(find_faces(self.analyzer, frames[number], recognise=False), faces[-1] if faces else None)
            if face is None:
                raise SampleError("no face in the clip", f"{name} shows no face in frame {number}")
            faces.append(face)
        boxes = between(np.stack([face.box for face in faces]), looked_at, len(frames))
        return boxes, between(np.stack([face.landmarks for face in faces]), looked_at, len(frames))

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


def _settings(source: Source, manifest: Path) -> dict[str, Any]:
    """Everything that the features depend on, beside the weights."""
    return {
        "format": FORMAT,
        "base": source.base.name,
        "manifest": hashlib.sha256(manifest.read_bytes()).hexdigest(),
        "width": source.width,
        "height": source.height,
        "frames": source.frames,
        "face_pack": source.face_pack,
        "face_every": FACE_EVERY,
        "samples_per_shard": SAMPLES_PER_SHARD,
        "id_encoder": asdict(source.id_encoder_config),
    }


def _check_settings(folder: Path, wanted: dict[str, Any]) -> None:
    """A folder holds the features of one manifest, one size, one set of weights."""
    path = folder / SETTINGS
    if not path.is_file():
        if any(folder.glob("*.safetensors")):
            raise SettingError(f"{folder} holds other files than features; choose an empty folder.")
        return
    try:
        found = read_object(path)
    except CheckpointError as error:
        raise SettingError(f"{error} Or remove {folder} and run this again.") from error
    differing = [name for name, value in wanted.items() if found.get(name) != value]
    if differing:
        name = differing[0]
        raise SettingError(
            f"{folder} was made with another {name}: {found.get(name)}, not {wanted[name]}. Choose another folder for "
            "`features`, or remove this one."
        )


def _check_space(folder: Path, source: Source, samples: int, references: int) -> None:
    """Raises MagicMirrorError if what is still to be written does not fit."""
    transformer, encoder = source.base.transformer_config, source.id_encoder_config
    latent_frames = (source.frames - 1) // 4 + 1
    sample = 2 * latent_frames * transformer["in_channels"] * (source.height // 8) * (source.width // 8)
    sample += 2 * transformer["max_text_seq_length"] * transformer["text_embed_dim"] + 4 * 14 * source.frames
    image_tokens = (encoder.clip_image_size // encoder.clip_patch_size) ** 2 + 1
    reference = 2 * image_tokens * encoder.clip_hidden_size + 2 * encoder.num_id_tokens * encoder.id_token_dim
    reference += 4 * encoder.id_embedding_dim
    written = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    needed = max(0, samples * sample + references * reference - written)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise MagicMirrorError(
            f"The features of {samples} samples and {references} references need about {needed / 1e9:.2f} GB more in "
            f"{folder}, where {free / 1e9:.2f} GB are free. Free some, or choose a `features` folder on another disk."
        )


def _write(path: Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    # One entry only: safetensors writes several in no fixed order.
    content = save(tensors, {ROWS: json.dumps(header)})
    with atomic_write(path) as temporary, _writing(path):
        temporary.write_bytes(content)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "The disk is full: free some space" if full else "Choose a folder that can be written"
        raise MagicMirrorError(
            f"{path} cannot be written: {error}. {remedy}, then run this again: it continues where it stopped."
        ) from error


def _index(folder: Path, samples: list[Sample], references: list[str], settings: dict[str, Any]) -> dict[str, Any]:
    """What `Features` opens. Raises MagicMirrorError if there is not one sample."""
    shards, table = [], {"references": [], "samples": []}
    reasons: dict[str, dict[str, list[str]]] = {"references": {}, "samples": {}}
    for kind, items in (("references", references), ("samples", samples)):
        for number in range(-(-len(items) // SAMPLES_PER_SHARD)):
            path = folder / shard_name(kind, number)
            header = header_of(path)
            shards.append({"file": path.name, "bytes": path.stat().st_size})
            table[kind] += [(name, number, row) for row, name in enumerate(header["rows"])]
            reasons[kind] |= header["skipped"]
    numbers = {path: number for number, (path, *_) in enumerate(table["references"])}
    by_id = {sample.id: sample for sample in samples}
    entries = []
    for name, shard, row in table["samples"]:
        seen = [numbers[path] for path in by_id[name].references if path in numbers]
        if seen:
            sample = by_id[name]
            entry = {"id": name, "person": sample.person, "references": seen, "repeat": sample.repeat}
            entries.append(entry | {"shard": shard, "row": row})
        else:
            why = reasons["references"][by_id[name].references[0]]
            reasons["samples"][name] = [f"no usable reference: {why[0]}", why[1]]
    counts = {kind: dict(Counter(why for why, _ in left_out.values())) for kind, left_out in reasons.items()}
    if not entries:
        raise MagicMirrorError(f"Not one of {len(samples)} samples can be used: {counts}. Check the data set first.")
    return {
        "settings": settings,
        "counts": {"samples": len(entries), "references": len(numbers), "skipped": counts},
        "skipped": reasons,
        "shards": [*shards, {"file": EMPTY, "bytes": (folder / EMPTY).stat().st_size}],
        "references": [{"path": path, "shard": shard, "row": row} for path, shard, row in table["references"]],
        "samples": entries,
    }
