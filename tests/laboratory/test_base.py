"""The small base's training: what its captions mean, and the scene that its hidden states are asked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLCogVideoX

from lab.people.manifest import repeats_of
from lab.people.scene import sample_clip
from lab.tiny.base import BaseTask, Latents, mislead
from lab.tiny.clips import SCENE, SHOWN, Clips, scene_of
from lab.tiny.text import TextTask
from mm_core.errors import SettingError
from mm_core.pipelines import tiny
from mm_core.training.diffusion import add_noise
from mm_core.training.loop import train
from mm_core.training.loop_config import LoopConfig

CAPTION = "A man img turns left, in a red T-shirt, before a green wall."


@pytest.fixture(scope="module")
def vae() -> AutoencoderKLCogVideoX:
    torch.manual_seed(0)
    return AutoencoderKLCogVideoX(**tiny.VAE)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the text encoder's training."""
    loop = LoopConfig(steps=100, batch_size=16, learning_rate=3e-3, validate_every=0, seed=2)
    return train(TextTask(2), loop, tmp_path_factory.mktemp("text"))


@pytest.fixture
def clips() -> Clips:
    return Clips(
        frames=np.zeros((3, 9, 64, 64, 3), np.uint8),
        persons=np.arange(3),
        captions=[CAPTION] * 3,
        scenes=np.stack([scene_of(sample_clip(seed, 0)) for seed in range(3)]),
        repeats=np.array([1, 2, 1]),
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
    model, ids = task.model.eval(), task.batch(range(1))["ids"]
    swapped = ids.clone()
    swapped[0, [1, 2]] = ids[0, [2, 1]]
    with torch.no_grad():
        one, other = (model.text_encoder(i)[0][0, 3] for i in (ids, swapped))
    assert (one - other).norm() > 0.1 * one.norm()


@pytest.mark.parametrize("frames", [1, 9])
def test_a_step(
    clips: Clips,
    vae: AutoencoderKLCogVideoX,
    text: Path,
    tmp_path: Path,
    frames: int,
    same_on_a_device: Callable[..., None],
) -> None:
    """The scene reaches the words and the blocks before it, not those after; what is exported is the model alone."""
    task = BaseTask(clips.captions, Latents.encode(clips, vae, frames, tmp_path / "latents.pt"), vae, 0, text)
    assert torch.equal(task.batch(range(2))["noisy"], task.batch(range(2))["noisy"])
    same_on_a_device(task.model, task.batch(range(2)))
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


def test_latents_of_other_clips_are_not_used(clips: Clips, vae: AutoencoderKLCogVideoX, tmp_path: Path) -> None:
    Latents.encode(clips, vae, 9, tmp_path / "clips.pt")
    fewer = replace(clips, frames=clips.frames[:2], captions=clips.captions[:2], scenes=clips.scenes[:2])
    with pytest.raises(SettingError, match="holds 3 latents, not 2: delete it"):
        Latents.encode(fewer, vae, 9, tmp_path / "clips.pt")


def test_misled_clips_lack_their_motion_and_lead_to_the_clean_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(4, 3, 2, 4, 4, generator=generator) for _ in range(2))
    alpha_bar = torch.tensor([0.0, 0.1, 0.5, 0.9], dtype=torch.float64)
    signal, rest = (values.float().view(-1, 1, 1, 1, 1) for values in (alpha_bar.sqrt(), (1 - alpha_bar).sqrt()))
    noisy = add_noise(clean, noise, alpha_bar)
    still = clean.mean(dim=1, keepdim=True)
    for share in (1.0, 0.0, -0.2):
        misled, between = mislead(noisy, clean, alpha_bar, torch.full((4,), share))
        assert misled.dtype == between.dtype == torch.float32
        assert torch.allclose(misled, signal * (still + share * (clean - still)) + rest * noise, atol=1e-5)
        assert torch.allclose(misled, signal * clean + rest * between, atol=1e-5)


def test_half_of_the_noisy_clips_are_misled(vae: AutoencoderKLCogVideoX, text: Path) -> None:
    latents = Latents(
        values=torch.randn(3, 3, 16, 16, 16, generator=torch.Generator().manual_seed(0)).half(),
        clip=np.arange(3),
        scenes=np.zeros((3, 3, SCENE), np.float32),
        repeats=np.ones(3, int),
    )
    batch = BaseTask([CAPTION] * 3, latents, vae, 0, text).batch(range(200))
    motion = batch["clean"] - batch["clean"].mean(dim=1, keepdim=True)
    snr = (batch["alpha_bar"] / (1 - batch["alpha_bar"])).sqrt()
    left = 1 + ((batch["noise"] * motion).flatten(1).sum(1) / motion.square().flatten(1).sum(1)) / snr
    assert ((left - 1).abs() < 0.1)[(batch["timestep"] > 200) & (batch["timestep"] < 400)].all()
    left = left[(batch["timestep"] >= 400) & (batch["timestep"] < 700)]
    assert 0.3 < (left < 0.8).float().mean() < 0.6 and left.min() > -0.4
    assert torch.allclose(batch["noisy"], add_noise(batch["clean"], batch["noise"], batch["alpha_bar"]), atol=1e-4)


def test_small_movements_are_shown_more_often(
    clips: Clips, vae: AutoencoderKLCogVideoX, text: Path, tmp_path: Path
) -> None:
    still = replace(sample_clip(0, 0), pitch=(0.0, 0.0), roll=(0.0, 0.0), expressions=("neutral", "neutral"))
    assert repeats_of(still) == 1
    assert repeats_of(replace(still, pitch=(5.0, -5.0))) == 4
    assert repeats_of(replace(still, roll=(-4.0, 4.0))) == 2
    assert repeats_of(replace(still, expressions=("neutral", "smile"))) == 5
    assert repeats_of(replace(still, expressions=("grin", "smile"))) == 1
    task = BaseTask(clips.captions, Latents.encode(clips, vae, 9, tmp_path / "latents.pt"), vae, 0, text)
    scenes = task.batch(range(4))["scene"]  # once through all
    counts = [sum(torch.equal(torch.from_numpy(task.latents.scenes[clip]), one) for one in scenes) for clip in range(3)]
    assert counts == [1, 2, 1]
