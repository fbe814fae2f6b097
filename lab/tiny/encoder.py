"""The small ID encoder, PhotoMaker-V2's structure: a ViT and the ID perceiver, trained to know people apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from torch import Tensor, nn

from mm_core.checkpoints.photomaker import save_id_encoder
from mm_core.faces.analysis import FaceAnalyzer
from mm_core.faces.crop import square_crop
from mm_core.files import atomic_write, write_json
from mm_core.models.id_encoder import IDEncoder
from mm_core.pipelines import tiny
from mm_core.training.randomness import generator_for, shuffled
from mm_core.training.task import Task

from .clips import Clips

WEIGHTS = "id_encoder.safetensors"
TEMPERATURE = 0.07
PIXELS_WEIGHT, TOKENS_WEIGHT = 1.0, 0.5
PATCH = 8  # pixels of a token's own patch that it must still know, out of 32: what the face looks like
JITTER = 0.08  # of the box: detectors differ


@dataclass(frozen=True, kw_only=True, eq=False)
class Faces:
    """The faces that were found, looking at one frame of each clip.

    found: (M,) the numbers of the clips. frame: (M,) that of the frame. box: (M, 4) in pixels. embedding: (M, 512).
    """

    found: np.ndarray
    frame: np.ndarray
    box: np.ndarray
    embedding: np.ndarray

    @classmethod
    def look(cls, clips: Clips, analyzer: FaceAnalyzer, cache: Path) -> Faces:
        """Find them, or read them from the cache of an earlier call."""
        if not cache.is_file():
            rows = []
            for number, frames in enumerate(clips.frames):
                frame = (int(clips.persons[number]) * 7 + number * 5) % len(frames)
                faces = analyzer.detect(frames[frame])
                if faces:
                    face = max(faces, key=lambda face: face.size)
                    rows.append((number, frame, face.box, face.embedding))
            found, frame, box, embedding = map(np.array, zip(*rows))
            with atomic_write(cache) as temporary, temporary.open("wb") as file:
                np.savez(file, found=found, frame=frame, box=box, embedding=embedding)
        with np.load(cache) as file:
            return cls(**file)


class _Recognition(nn.Module):
    """The encoder with heads that are thrown away after training."""

    def __init__(self) -> None:
        super().__init__()
        config = tiny.ID_ENCODER
        self.encoder = IDEncoder(config)
        # Only for the published file's sake in the module: nothing reads them.
        unused = ("visual_projection", "visual_projection_2", "fuse_module", "vision_model.post_layernorm")
        for name in unused:
            self.encoder.get_submodule(name).requires_grad_(False)
        self.of_tokens = nn.Linear(config.num_id_tokens * config.id_token_dim, 128)
        self.of_image = nn.Linear(config.clip_hidden_size, 128)
        self.pixels = nn.Linear(config.clip_hidden_size, 3 * PATCH**2)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Reads the pixels, (B, 2, 3, 224, 224), and embeddings, (B, 2, 512), of two clips of each person."""
        pixels = batch["pixels"].flatten(0, 1)
        features = self.encoder(pixels, batch["embeddings"].flatten(0, 1))
        patches = features.structure_tokens[:, 1:]  # the first is the class token
        side = pixels.shape[-1] // tiny.ID_ENCODER.clip_patch_size
        seen = F.interpolate(pixels, size=side * PATCH, mode="area")
        seen = F.pixel_unshuffle(seen, PATCH).flatten(2).transpose(1, 2)  # (2B, S, 3 * PATCH ** 2)
        pixel_error = (self.pixels(patches) - seen).abs().flatten(1).mean(dim=1)
        tokens, accuracy = _contrast(self.of_tokens(features.id_tokens.flatten(1)))
        image, _ = _contrast(self.of_image(patches.mean(dim=1)))
        pixel_error = pixel_error.unflatten(0, (-1, 2)).mean(dim=1)
        loss = tokens + TOKENS_WEIGHT * image + PIXELS_WEIGHT * pixel_error
        return {"loss": loss, "identity": tokens, "image": image, "pixels": pixel_error, "accuracy": accuracy}


def _contrast(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """InfoNCE of (2B, d), two rows a person: each person's (B,) loss, and how often the right one was nearest."""
    first, second = F.normalize(vectors, dim=-1).unflatten(0, (-1, 2)).unbind(1)
    logits = first @ second.T / TEMPERATURE
    right = torch.arange(len(logits), device=logits.device)
    loss = (F.cross_entropy(logits, right, reduction="none") + F.cross_entropy(logits.T, right, reduction="none")) / 2
    return loss, (logits.argmax(dim=1) == right).float()


class EncoderTask(Task):
    def __init__(self, clips: Clips, faces: Faces, seed: int, start: Path | None = None) -> None:
        torch.manual_seed(seed)
        self.model = _Recognition()
        self.clips, self.faces, self.seed = clips, faces, seed
        persons = clips.persons[faces.found]
        self.by_person = [rows for rows in (np.flatnonzero(persons == p) for p in np.unique(persons)) if len(rows) > 1]
        apart = min(64, len(self.by_person) // 4)
        self.held_out, self.by_person = self.by_person[-apart:], self.by_person[:-apart]

    def batch(self, samples: range) -> dict[str, Tensor]:
        pixels, embeddings = [], []
        for sample in samples:
            generator = generator_for(self.seed, sample)
            rows = self.by_person[shuffled(sample, len(self.by_person), self.seed)]
            pair = torch.randperm(len(rows), generator=generator)[:2].tolist()
            pixels.append(torch.stack([self._crop(rows[i], generator) for i in pair]))
            embeddings.append(torch.from_numpy(self.faces.embedding[rows[pair]]))
        return {"pixels": torch.stack(pixels), "embeddings": torch.stack(embeddings)}

    def _crop(self, row: int, generator: torch.Generator | None = None) -> Tensor:
        picture = self.clips.frames[self.faces.found[row], self.faces.frame[row]]
        box = self.faces.box[row].copy()
        if generator is not None:
            width = box[2:] - box[:2]
            box += (torch.rand(4, generator=generator).numpy() - 0.5) * 2 * JITTER * np.tile(width, 2)
        return torch.from_numpy(square_crop(picture, box)).permute(2, 0, 1).float() / 255

    def export(self, weights: Mapping[str, Tensor], path: Path, step: int) -> None:
        # With the frozen parts, which stay as they were made: the file must be complete.
        whole = self.model.encoder.state_dict()
        whole |= {name.removeprefix("encoder."): t for name, t in weights.items() if name.startswith("encoder.")}
        encoder = IDEncoder(tiny.ID_ENCODER)
        encoder.load_state_dict(whole)
        save_id_encoder(encoder, path / WEIGHTS, tiny.ID_ENCODER)

    def validate(self, step: int, folder: Path) -> dict[str, float]:
        """How often a person left out of training is found among 64 by a picture from another clip."""
        rows = np.stack([rows[:2] for rows in self.held_out])
        pixels = torch.stack([torch.stack([self._crop(i) for i in pair]) for pair in rows])
        batch = {"pixels": pixels, "embeddings": torch.from_numpy(self.faces.embedding[rows])}
        values = self.model(send_to_device(batch, self.model.pixels.weight.device))
        result = {name: float(value.mean()) for name, value in values.items()}
        write_json(folder / "values.json", result)
        return result
