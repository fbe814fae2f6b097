"""Judges of sampled clips of rendered people: what they learn from a handful of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLCogVideoX
from safetensors.torch import save_file

from lab.people.person import Person
from lab.people.render import render_clip
from lab.people.scene import sample_clip
from lab.tiny.clips import to_unit
from lab.tiny.judges import (
    POSE_UNITS,
    FaceTask,
    PoseTask,
    RenderedJudge,
    crops_of,
    description,
    people_of,
    pose_of,
)
from mm_core.data.features import FORMAT, INDEX, ROWS, Features, shard_name
from mm_core.faces.analysis import FaceAnalyzer
from mm_core.pipelines import tiny
from mm_core.pipelines.base import TinyBase
from mm_core.pipelines.presets import TEMPORAL_COMPRESSION
from mm_core.training.loop import train
from mm_core.training.loop_config import LoopConfig
from mm_core.training.sample_losses import decode_frame

PEOPLE, CLIPS = 3, 3


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory, insightface_root: Path) -> Features:
    """Real clips in tiny's latents; prompts of noise."""
    analyzer = FaceAnalyzer(insightface_root, "buffalo_sc")
    vae = AutoencoderKLCogVideoX.from_pretrained(TinyBase().folder / "vae")
    latents, landmarks, samples = [], [], []
    for seed in range(PEOPLE):
        for clip in range(CLIPS):
            frames = render_clip(Person.from_seed(seed), sample_clip(seed, clip))
            with torch.no_grad():
                encoded = vae.encode(to_unit(frames[None]).permute(0, 4, 1, 2, 3)).latent_dist.mean[0]
            latents.append(encoded.transpose(0, 1) * vae.config.scaling_factor)
            landmarks.append(np.stack([analyzer.detect(frame)[0].landmarks for frame in frames]))
            samples.append({"id": f"{seed}-{clip}", "person": str(seed), "references": [0], "shard": 0})
    count = len(samples)
    folder = tmp_path_factory.mktemp("features")
    noise = torch.randn(
        count + 1, tiny.TEXT_TOKENS, tiny.TRANSFORMER["text_embed_dim"], generator=torch.Generator().manual_seed(0)
    )
    tensors = {
        "latents": torch.stack(latents).half().contiguous(), "boxes": torch.zeros(count, 9, 4),
        "landmarks": torch.from_numpy(np.stack(landmarks)).float(),
    }  # fmt: skip
    save_file(tensors, folder / shard_name("samples", 0), {ROWS: json.dumps({"rows": [], "skipped": {}})})
    prompts = {"prompt_embeds": noise.half(), "slots": torch.zeros(count + 1, 2, dtype=torch.long)}
    save_file(prompts, folder / shard_name("prompts", 0), {ROWS: "{}"})
    shards = [{"file": path.name, "bytes": path.stat().st_size} for path in folder.iterdir()]
    index = {
        "settings": {"format": FORMAT}, "counts": {}, "shards": shards, "references": [],
        "prompts": [{"shard": 0, "row": row} for row in range(count + 1)],
        "samples": [sample | {"row": row, "prompt": row + 1} for row, sample in enumerate(samples)],
    }  # fmt: skip
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")
    return Features.open(folder)


def test_poses_are_the_renderers() -> None:
    """At the last frame of each latent frame; the middle of a movement is half of it."""
    clip = sample_clip(0, 0)
    poses = pose_of(clip) * torch.tensor(POSE_UNITS)
    assert poses.shape == (3, 4)
    for column, path in enumerate((clip.yaw, clip.pitch, clip.roll)):
        assert poses[:, column].tolist() == pytest.approx([path[0], sum(path) / 2, path[1]])
    begins = next(
        pose_of(each)[:, 3] for each in (sample_clip(0, n) for n in range(100))
        if each.expressions[0] == "neutral" and each.expressions[1] == "smile"
    )  # fmt: skip
    assert begins.tolist() == [0, 1, 2]
    assert description("0-0") == clip


def test_judges_know_the_clip_and_the_person(
    features: Features, tmp_path: Path, same_on_a_device: Callable[..., None]
) -> None:
    """After a few steps on these clips the right movement and the right person are preferred, and gradients flow."""
    base = TinyBase().folder
    crops = crops_of(features, base / "vae", tmp_path / "faces" / "crops.safetensors")
    assert torch.equal(crops, crops_of(features, base / "no such folder", tmp_path / "faces" / "crops.safetensors"))
    common = dict(weight_decay=0.0, ema_decay=0.0, warmup_steps=0, save_every=100, log_every=100)
    loop = LoopConfig(steps=60, batch_size=12, learning_rate=2e-3, **common)
    poses, faces = PoseTask(features, base, 3.0, 0), FaceTask(features, crops, 0)
    same_on_a_device(poses.model.eval(), poses.batch(range(4)))
    poses.model.train()
    for task in (poses, faces):
        first, again = (task.batch(range(12, 24)) for _ in range(2))
        assert all(torch.equal(first[name], again[name]) for name in first)
    before = {name: value.clone() for name, value in poses.model.transformer.state_dict().items()}
    pose, face = train(poses, loop, tmp_path / "poses"), train(faces, loop, tmp_path / "faces")
    assert all(torch.equal(before[name], value) for name, value in poses.model.transformer.state_dict().items())

    judge = RenderedJudge(features, crops, pose, face)
    rows = [row for row, entry in enumerate(features.entries) if _turns(entry["id"])]
    clips = torch.stack([features.sample(row)["latents"].float() for row in rows])
    right, wrong = (judge.of_clips(shown, clips, torch.tensor(rows)) for shown in (clips, clips.flip(1)))
    assert right.shape == (len(rows),) and (right < wrong).all()

    vae = AutoencoderKLCogVideoX.from_pretrained(base / "vae")
    people = people_of(features)
    for row in (0, CLIPS):
        sample = features.sample(row)
        frames = decode_frame(vae, sample["latents"].float()[:, None]).detach().requires_grad_(True)
        losses = [
            judge.of_faces(frames, sample["landmarks"][::TEMPORAL_COMPRESSION], torch.full((3,), other))
            for other in (row, (row + CLIPS) % len(people))
        ]
        assert (losses[0] < losses[1]).all()
        losses[0].sum().backward()
        assert frames.grad.any()


def _turns(sample: str) -> bool:
    yaw = description(sample).yaw
    return abs(yaw[1] - yaw[0]) > 15
