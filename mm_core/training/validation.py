"""People left out of training, while the adapter trains: clips of them, scored, and the noise loss on theirs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object, send_to_device
from diffusers import CogVideoXPipeline
from torch import Tensor

from ..data.features import Features
from ..faces.analysis import FaceAnalyzer
from ..faces.tracking import find_faces
from ..files import write_json
from ..memory import on_device
from ..models.id_encoder import FaceFeatures
from ..pipelines.base import BaseModel
from ..pipelines.clip import ClipSettings
from ..pipelines.conditioning import condition
from ..pipelines.control import AdapterSettings
from ..pipelines.decode import decode
from ..pipelines.denoise import denoise
from ..pipelines.identity import Identity
from ..video import write_video
from .config import StageConfig, TrainingConfig
from .losses import noise_loss
from .sources import face_analyzer
from .step import AdapterTraining

STEPS, GUIDANCE = 25, 4.0
SAMPLES, LEVELS = 16, (100, 300, 500, 700, 900)
"""Held-out samples, and noise levels of each, that the noise loss is measured on, with the same noise each time."""


class TrainedStage(Protocol):
    """What `adapter_task.AdapterTask` holds, as far as it is read here."""

    config: TrainingConfig
    stage: StageConfig
    base: BaseModel
    features: Features
    validation: np.ndarray
    """Rows of the features of people who are left out of training."""
    pipe: CogVideoXPipeline
    model: AdapterTraining
    alphas_bar: Tensor

    def draw(self, row: int, number: int, whole: bool = False) -> dict[str, Tensor]: ...

    def stacked(self, drawn: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]: ...


@torch.no_grad()
def validate(task: TrainedStage, folder: Path) -> dict[str, float]:
    """A clip of each validation person, from its own caption and one reference: how alike, how often a face; and the
    noise loss with the adapter and of the base alone.

    Called in all processes, each of which takes a part.
    """
    process = PartialState()
    rows = {task.features.entries[row]["person"]: int(row) for row in task.validation}
    mine = list(enumerate(rows.values()))[process.process_index :: process.num_processes]
    analyzer = face_analyzer(task.config)
    cosines = gather_object([cosine for number, row in mine for cosine in _scored(task, analyzer, number, row, folder)])
    found = [cosine for cosine in cosines if cosine is not None]
    rows = task.validation[:SAMPLES][process.process_index :: process.num_processes]
    losses = gather_object([loss for row in rows.tolist() for loss in _noise_losses(task, row)])
    adapted, base = (float(np.mean(column)) for column in zip(*losses)) if losses else (float("nan"),) * 2
    values = {
        "face_rate": len(found) / len(cosines) if cosines else float("nan"),
        "id_similarity": float(np.mean(found)) if found else float("nan"),
        "noise_loss": adapted,
        "base_loss": base,
    }
    if process.is_main_process:
        write_json(folder / "values.json", {name: value for name, value in values.items() if isfinite(value)})
    return values


def _scored(task: TrainedStage, analyzer: FaceAnalyzer, number: int, row: int, folder: Path) -> Iterator[float | None]:
    """The cosine of each frame of a clip; None without a face."""
    sample = task.features.sample(row)
    reference = task.features.reference(sample["references"][0])
    frames = _clip(task, sample, reference)
    write_video(folder / f"{number:02d}.mp4", frames, task.base.limits.fps, format="mp4")
    target = reference["embedding"].numpy()
    for frame in (frames.numpy() * 255).round().astype(np.uint8):
        faces = find_faces(analyzer, frame)
        face = max(faces, key=lambda face: face.size, default=None)
        yield None if face is None else float(face.normed_embedding @ target / np.linalg.norm(target))


def _clip(task: TrainedStage, sample: dict[str, Tensor], reference: dict[str, Tensor]) -> Tensor:
    """(F, H, W, 3), 0..1."""
    pipe, model = task.pipe, task.model
    device = pipe.transformer.device
    dtype = pipe.transformer.dtype
    features = FaceFeatures(
        id_tokens=reference["id_tokens"][None].float(), structure_tokens=reference["structure_tokens"][None].float()
    )
    settings: AdapterSettings = model.settings
    clip = ClipSettings(
        prompt="a person", width=task.config.width, height=task.config.height, num_frames=task.stage.frames,
        steps=STEPS, guidance_scale=GUIDANCE, dynamic_guidance=False, scheduler="ddim",
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler.set_timesteps(STEPS)
    prompt = sample["prompt_embeds"][None].to(device, dtype)
    slots = tuple(sample["slots"].tolist()) if settings.id_branch else ()
    identity = Identity(features=features, references=())
    with on_device([pipe.vae], device), _precision(task):
        face = condition(model.attached, identity, prompt, slots, pipe.scheduler.timesteps, settings, device)
        latents = denoise(pipe, clip, prompt, task.features.empty.to(device, dtype), face)
        return decode(pipe.vae, latents.permute(0, 2, 1, 3, 4), device)


def _noise_losses(task: TrainedStage, row: int) -> Iterator[tuple[float, float]]:
    """With the adapter and without, at each level; prompt, photo and noise are the same at each validation."""
    model = task.model
    for place, level in enumerate(LEVELS):
        sample = task.draw(row, row * len(LEVELS) + place, whole=True)
        sample |= {"timestep": torch.tensor(level), "alpha_bar": task.alphas_bar[level]}
        batch = send_to_device(task.stacked([sample]), task.pipe.transformer.device)
        with _precision(task):
            predictions = model.predict(batch, *model.identity(batch)), model.predict(batch, batch["text"], None)
        yield tuple(
            float(noise_loss(prediction, batch["clean"], batch["noise"], batch["alpha_bar"]))
            for prediction in predictions
        )


@contextmanager
def _precision(task: TrainedStage) -> Iterator[None]:
    """That of training: the base's own."""
    transformer = task.pipe.transformer
    with torch.autocast(transformer.device.type, transformer.dtype, enabled=transformer.dtype != torch.float32):
        yield
