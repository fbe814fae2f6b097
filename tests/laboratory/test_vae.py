"""The small VAE's training: what its losses see."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLCogVideoX

from lab.people.person import Person
from lab.people.render import render_clip
from lab.people.scene import sample_clip
from lab.tiny.base import Latents
from lab.tiny.clips import SCENE, Clips
from lab.tiny.vae import DecoderTask, RecogniserFeatures, VAETask, smooth
from mm_core.faces.analysis import FaceAnalyzer
from mm_core.faces.arcface import DifferentiableArcFace
from mm_core.pipelines.base import TinyBase
from mm_core.training.loop import train
from mm_core.training.loop_config import LoopConfig


def test_features_see_what_pixels_hardly_see(recogniser: DifferentiableArcFace) -> None:
    """0 for the same picture; a face whose fine detail is gone is further away than one that is just darker."""
    torch.manual_seed(0)
    picture = torch.rand(2, 3, 64, 64) * 2 - 1
    features = RecogniserFeatures(recogniser)
    assert features.distance(picture, picture).abs().max() < 1e-6
    blurred = torch.nn.functional.avg_pool2d(picture, 3, 1, 1)
    assert (features.distance(blurred, picture) > 3 * features.distance(picture * 0.9, picture)).all()


def test_gradients_reach_the_picture_and_not_the_recogniser(recogniser: DifferentiableArcFace) -> None:
    picture = torch.zeros(1, 3, 64, 64, requires_grad=True)
    RecogniserFeatures(recogniser).distance(picture, torch.rand(1, 3, 64, 64)).sum().backward()
    assert picture.grad.abs().sum() > 0
    assert all(p.grad is None for p in recogniser.parameters())


def test_smooth_keeps_means_and_shape() -> None:
    values = torch.arange(16.0).view(1, 1, 1, 4, 4)
    assert smooth(values)[0, 0, 0].tolist() == [[2.5, 2.5, 4.5, 4.5]] * 2 + [[10.5, 10.5, 12.5, 12.5]] * 2


@pytest.mark.parametrize("frames", [1, 9])
def test_a_step(recogniser: DifferentiableArcFace, frames: int, same_on_a_device: Callable[..., None]) -> None:
    """Every weight has a gradient, on a device too, and a batch is the same whenever it is asked for."""
    clips = Clips(
        frames=np.random.default_rng(0).integers(0, 256, (4, 9, 64, 64, 3), dtype=np.uint8),
        persons=np.arange(4),
        captions=[""] * 4,
        scenes=np.zeros((4, 9, SCENE), np.float32),
        repeats=np.ones(4, int),
    )
    task = VAETask(clips, frames, recogniser, 0)
    first, again = task.batch(range(3, 5)), task.batch(range(3, 5))
    assert all(torch.equal(first[name], again[name]) for name in first)
    values = task.model(first)
    assert all(value.shape == (2,) and value.isfinite().all() for value in values.values())
    values["loss"].mean().backward()
    assert all(p.grad is not None for p in task.model.parameters())
    same_on_a_device(task.model, first, recogniser)


def test_the_decoder_learns_alone(
    recogniser: DifferentiableArcFace, insightface_root: Path, tmp_path: Path, same_on_a_device: Callable[..., None]
) -> None:
    """A few steps on two people make its frames more alike, and leave the latents as they were."""
    frames = np.stack([render_clip(Person.from_seed(seed), sample_clip(seed, 0)) for seed in (0, 1)])
    clips = Clips(
        frames=frames, persons=np.arange(2), captions=[""] * 2, scenes=np.zeros((2, 9, SCENE), np.float32),
        repeats=np.ones(2, int),
    )  # fmt: skip
    start = TinyBase().folder / "vae"
    latents = Latents.encode(clips, AutoencoderKLCogVideoX.from_pretrained(start), 9, tmp_path / "latents.pt").values
    task = DecoderTask(clips, latents, recogniser, FaceAnalyzer(insightface_root, "buffalo_sc"), 0, start)
    first, again = task.batch(range(4)), task.batch(range(4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    same_on_a_device(task.model, first, recogniser)
    before = {name: value.clone() for name, value in task.vae.state_dict().items()}
    loop = LoopConfig(steps=4, batch_size=2, learning_rate=5e-4, ema_decay=0)
    with torch.no_grad():
        likeness = task.validate(0, tmp_path)["likeness"]
    trained = AutoencoderKLCogVideoX.from_pretrained(train(task, loop, tmp_path / "run") / "vae")
    with torch.no_grad():
        assert task.validate(4, tmp_path)["likeness"] < likeness
    changed = {name.split(".")[0] for name, value in trained.state_dict().items() if not value.equal(before[name])}
    assert changed == {"decoder"}
