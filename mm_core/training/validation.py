"""Clips of people left out of training, made and scored while the adapter trains."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..faces.analysis import FaceAnalyzer
from ..faces.tracking import find_faces
from ..files import write_json
from ..memory import on_device
from ..models.id_encoder import FaceFeatures
from ..pipelines.clip import ClipSettings
from ..pipelines.conditioning import condition
from ..pipelines.control import AdapterSettings
from ..pipelines.decode import decode
from ..pipelines.denoise import denoise
from ..pipelines.identity import Identity
from ..video import write_video
from .stage import TrainedStage

STEPS, GUIDANCE = 25, 4.0


def validate_clips(task: TrainedStage, folder: Path) -> dict[str, float]:
    """One clip for each validation person, from its own caption and one reference: how alike, how often a face."""
    config, features = task.config, task.features
    analyzer = FaceAnalyzer(Path(config.insightface_root).expanduser(), config.face_pack)
    rows = {features.entries[row]["person"]: int(row) for row in task.validation}
    scores, found = [], []
    for number, row in enumerate(rows.values()):
        sample = features.sample(row)
        reference = features.reference(sample["references"][0])
        frames = _clip(task, sample, reference)
        write_video(folder / f"{number:02d}.mp4", frames, task.base.limits.fps, format="mp4")
        target = reference["embedding"].numpy()
        for frame in (frames.numpy() * 255).round().astype(np.uint8):
            faces = find_faces(analyzer, frame)
            found.append(bool(faces))
            if faces:
                face = max(faces, key=lambda face: face.size)
                scores.append(float(face.normed_embedding @ target / np.linalg.norm(target)))
    values = {"face_rate": float(np.mean(found)), "id_similarity": float(np.mean(scores)) if scores else float("nan")}
    write_json(folder / "values.json", values)
    return values


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
    with on_device([pipe.vae], device), torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        face = condition(model.attached, identity, prompt, slots, pipe.scheduler.timesteps, settings, device)
        latents = denoise(pipe, clip, prompt, task.features.empty.to(device, dtype), face)
        return decode(pipe.vae, latents.permute(0, 2, 1, 3, 4), device)
