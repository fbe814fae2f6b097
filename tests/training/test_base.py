"""The small base's training: what its captions mean, and the scene that its hidden states are asked for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLCogVideoX

from mm_core.data.people.scene import sample_clip
from mm_core.pipelines import tiny
from mm_core.training.loop import LoopConfig, train
from mm_core.training.small.base import BaseTask, Latents
from mm_core.training.small.clips import SCENE, SHOWN, Clips, scene_of
from mm_core.training.small.text import TextTask

CAPTION = "A man img turns left, in a red T-shirt, before a green wall."


@pytest.fixture(scope="module")
def vae() -> AutoencoderKLCogVideoX:
    torch.manual_seed(0)
    return AutoencoderKLCogVideoX(**tiny.VAE)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the text encoder's training."""
    loop = LoopConfig(steps=100, batch_size=16, learning_rate=3e-3, optimizer="muon", validate_every=0, seed=2)
    return train(TextTask(2), loop, tmp_path_factory.mktemp("text"))


@pytest.fixture
def clips() -> Clips:
    return Clips(
        frames=np.zeros((3, 9, 64, 64, 3), np.uint8),
        persons=np.arange(3),
        captions=[CAPTION] * 3,
        scenes=np.stack([scene_of(sample_clip(seed, 0)) for seed in range(3)]),
    )


def test_scene_begins_and_ends_as_the_clip_does() -> None:
    clip = sample_clip(0, 0)
    scene = scene_of(clip)
    assert scene.shape == (9, SCENE)
    for column, (path, limit) in enumerate([(clip.yaw, 34), (clip.pitch, 13), (clip.roll, 9)]):
        assert np.allclose(scene[[0, -1], column] * limit, path, atol=1e-4)
    shown = dict(zip(SHOWN, scene[-1, 3 : 3 + len(SHOWN)]))
    assert {name for name, share in shown.items() if share} == {clip.expressions[1]} - {"neutral"}


def test_captions_are_learnt(text: Path) -> None:
    metrics = [json.loads(line) for line in (text.parents[1] / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["loss"] < 0.6 * metrics[0]["loss"]


def test_words_know_their_neighbours_before_training() -> None:
    """The colour of the wall and that of the shirt, swapped, are told apart by the word after them."""
    task = TextTask(0)
    model, ids = task.model.train(False), task.batch(range(1))["ids"]
    swapped = ids.clone()
    swapped[0, [1, 2]] = ids[0, [2, 1]]
    with torch.no_grad():
        one, other = (model.text_encoder(i)[0][0, 3] for i in (ids, swapped))
    assert (one - other).norm() > 0.1 * one.norm()


@pytest.mark.parametrize("frames", [1, 9])
def test_a_step(clips: Clips, vae: AutoencoderKLCogVideoX, text: Path, tmp_path: Path, frames: int) -> None:
    """The scene reaches the words and the blocks before it, not those after; what is exported is the model alone."""
    task = BaseTask(clips.captions, Latents.encode(clips, vae, frames, tmp_path / "latents.pt"), vae, 0, text)
    assert torch.equal(task.batch(range(2))["noisy"], task.batch(range(2))["noisy"])
    values = task.model(task.batch(range(2)))
    assert torch.allclose(values["loss"], values["noise_loss"] + values["scene_loss"] + values["motion_loss"])
    assert (values["motion_loss"] > 0).all() == (frames > 1)
    values["scene_loss"].mean().backward()
    reached = {name for name, parameter in task.model.named_parameters() if parameter.grad is not None}
    assert any(name.startswith("text_encoder") for name in reached)
    assert "scene.weight" in reached and "transformer.proj_out.weight" not in reached
    assert not any(f"transformer_blocks.{block}." in name for name in reached for block in range(4, 8))
    task.export({}, tmp_path / "out", 1)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["text_encoder", "transformer"]


def test_latents_know_the_scene_of_their_frames(clips: Clips, vae: AutoencoderKLCogVideoX, tmp_path: Path) -> None:
    scenes = Latents.encode(clips, vae, 9, tmp_path / "clips.pt").scenes
    assert scenes.shape == (3, 3, SCENE)
    assert np.allclose(scenes[:, 0], clips.scenes[:, 0])
    assert np.allclose(scenes[:, 2], clips.scenes[:, 5:9].mean(1), atol=1e-6)
