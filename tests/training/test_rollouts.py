"""Clips that the model in training samples itself: they are what inference makes, and a resumed run keeps them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import stand_ins
import torch
from adapter_runs import losses, train_on_two_processes, with_stage
from feature_files import PIXEL_FRAMES, write_features
from tiny_models import ADAPTER_SIZES, save_tiny_folder
from torch import Tensor, nn

from mm_core.models.id_encoder import FaceFeatures
from mm_core.pipelines.clip import ClipSettings
from mm_core.pipelines.conditioning import condition
from mm_core.pipelines.denoise import denoise
from mm_core.pipelines.identity import Identity
from mm_core.training.adapter_task import AdapterTask
from mm_core.training.config import SamplingConfig, StageConfig, TrainingConfig
from mm_core.training.loop import train
from mm_core.training.loop_config import LoopConfig
from mm_core.training.randomness import shuffled

STEPS, GUIDANCE, BATCH = 4, 3.0, 4


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_folder("5b", tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(autouse=True)
def _judges(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_ins.install(monkeypatch.setattr)


@pytest.fixture
def config(base: Path, tmp_path: Path) -> TrainingConfig:
    features = write_features(tmp_path / "clips")
    loop = LoopConfig(steps=6, batch_size=BATCH, learning_rate=1e-3, ema_decay=0.0, log_every=1, save_every=2, keep=9)
    stage = StageConfig(
        data="", features=str(features), frames=9, loop=loop, identity_weight=0.5, identity_timesteps=(0, 900),
        sampling=SamplingConfig(clips=BATCH, steps=STEPS, guidance=GUIDANCE),
    )  # fmt: skip
    image = replace(stage, frames=1, sampling=None)
    return TrainingConfig(
        base=str(base), output=str(tmp_path / "run"), width=48, height=32, adapter=ADAPTER_SIZES, image=image,
        video=stage,
    )  # fmt: skip


def away_from_zero(task: AdapterTask) -> None:
    """A fresh adapter changes nothing; this one does."""
    torch.manual_seed(0)
    for parameter in task.model.adapter.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)


def step(task: AdapterTask, number: int) -> dict[str, Tensor]:
    return task.model(task.batch(range(number * BATCH, (number + 1) * BATCH)))


@torch.no_grad()
def test_a_rollout_is_what_inference_samples(config: TrainingConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """With weights that stand still: the pipeline's own clip from the same noise, prompt and photo."""
    task = AdapterTask(config, "video")
    away_from_zero(task)
    drawn = AdapterTask.draw

    def with_noise(self: AdapterTask, row: int, number: int, whole: bool = False) -> dict[str, Tensor]:
        sample = drawn(self, row, number, whole)
        shape = (1, *sample["clean"].shape)
        return sample | {"noise": torch.randn(shape, generator=torch.Generator().manual_seed(number))[0]}

    monkeypatch.setattr(AdapterTask, "draw", with_noise)
    task.model.eval()
    for number in range(STEPS):
        step(task, number)
    ours = task.state.state_dict()["0"]

    sample = task.draw(task.training[shuffled(0, len(task.training), 0)], 0, whole=True)
    pipe = task.pipe
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = task.state.scheduler
    clip = ClipSettings(
        prompt="a person", width=48, height=32, num_frames=PIXEL_FRAMES, steps=STEPS, guidance_scale=GUIDANCE,
        dynamic_guidance=False, scheduler="ddim", seed=0,
    )  # fmt: skip
    photo = FaceFeatures(id_tokens=sample["id_tokens"], structure_tokens=sample["structure_tokens"])
    prompt, device = sample["text"][None], torch.device("cpu")
    face = condition(
        task.model.attached, Identity(features=photo, references=()), prompt,
        tuple(sample["slots"].tolist()), pipe.scheduler.timesteps, task.model.settings, device,
    )  # fmt: skip
    theirs = denoise(pipe, clip, prompt, task.features.empty.float(), face)[0]
    plain = denoise(pipe, clip, prompt, task.features.empty.float(), None)[0]
    assert torch.allclose(ours, theirs, atol=1e-4)
    assert not torch.allclose(ours, plain, atol=1e-2)  # the identity is seen in it


@pytest.mark.parametrize("clips", [BATCH, 3 * BATCH])
def test_clips_take_turns_and_cover_the_noise_levels(config: TrainingConfig, clips: int) -> None:
    """Each step sees all levels; each clip goes through its levels in order, with the sample that it began with."""
    sampling = replace(config.video.sampling, clips=clips)
    rollouts = AdapterTask(with_stage(config, identity_start=3, sampling=sampling), "video").state
    seen: dict[int, set[int]] = {}
    for number in range(3 * BATCH, 40 * BATCH):
        done, began = rollouts.progress(number)
        seen.setdefault(number // BATCH, set()).add(done)
        before = number - clips
        if done and before >= 3 * BATCH:
            assert rollouts.progress(before) == (done - 1, began)
        else:
            assert began == number
    assert all(levels == set(range(STEPS)) for levels in seen.values())


def test_losses_act_where_they_should(config: TrainingConfig) -> None:
    """Not before their step, the identity at its levels, not on noised samples; gradients reach the adapter."""
    task = AdapterTask(with_stage(config, identity_start=1, text_dropout=0.0), "video")
    away_from_zero(task)
    before = step(task, 0)
    assert torch.equal(before["loss"], before["noise_loss"]) and "identity_loss" not in before
    batch = task.batch(range(BATCH, 2 * BATCH))
    assert len(batch["judged"]) == 0
    judged = batch["rollout"]["timestep"] < 900
    assert 0 < judged.sum() < BATCH
    values = task.model(batch)
    assert torch.equal(values["identity_loss"].isfinite(), judged)
    added = 0.5 * values["identity_loss"].nan_to_num(0)
    assert torch.allclose(values["loss"], values["noise_loss"] + added)
    task.model.zero_grad()
    (values["loss"] - values["loss"].detach()).sum().backward()
    assert all(p.grad is not None for p in task.model.adapter.blocks["0"].can.parameters())


def test_a_clip_without_a_face_is_not_judged(config: TrainingConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mm_core.training.sample_losses.find_faces", lambda analyzer, frame, recognise: [])
    task = AdapterTask(with_stage(config, text_dropout=0.0), "video")
    values = step(task, 0)
    assert not values["identity_loss"].isfinite().any()
    assert torch.equal(values["loss"], values["noise_loss"])


def test_resume(config: TrainingConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the middle of its clips, a run goes on with them: the same losses, bit for bit."""
    config = with_stage(config, sampling=replace(config.video.sampling, clips=2 * BATCH))
    whole, cut = Path(config.output) / "whole", Path(config.output) / "cut"
    train(AdapterTask(config, "video"), config.video.loop, whole)
    killed = AdapterTask(config, "video")
    batch = killed.batch

    def until_killed(samples: range) -> dict[str, Tensor]:
        if samples.start == 3 * BATCH:
            raise MemoryError
        return batch(samples)

    monkeypatch.setattr(killed, "batch", until_killed)
    with pytest.raises(MemoryError):
        train(killed, config.video.loop, cut)
    train(AdapterTask(config, "video"), config.video.loop, cut)
    assert losses(cut) == losses(whole)


def test_two_processes_equal_one(config: TrainingConfig, tmp_path: Path) -> None:
    """Each place's clip is made by the process that has the place, whichever; and a checkpoint has all of them."""
    train(AdapterTask(config, "video"), config.video.loop, tmp_path / "one")
    train_on_two_processes(config, tmp_path / "two", "import stand_ins; stand_ins.install()")
    one, two = (losses(tmp_path / name) for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-4)
    last = tmp_path / "two" / "checkpoints" / "step-00000006"
    states = [torch.load(path, weights_only=True) for path in last.glob("state.pt")]
    assert [sorted(state) for state in states] == [[str(place) for place in range(BATCH)]]


@pytest.mark.parametrize("changes", [dict(clips=0), dict(steps=0), dict(guidance=0.5)])
def test_wrong_settings(changes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        SamplingConfig(**dict(clips=4) | changes)
