"""Clips that the model in training samples itself: they are what inference makes, and a resumed run keeps them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import stand_ins
import torch
from adapter_runs import losses, train_on_two_processes, with_stage
from diffusers import CogVideoXDDIMScheduler
from feature_files import PIXEL_FRAMES, write_features
from tiny_models import ADAPTER_SIZES, save_tiny_folder
from torch import Tensor, nn

from mm_core.errors import SettingError
from mm_core.models.id_encoder import FaceFeatures
from mm_core.pipelines.clip import ClipSettings
from mm_core.pipelines.conditioning import condition
from mm_core.pipelines.denoise import denoise
from mm_core.pipelines.identity import Identity
from mm_core.training.adapter_task import AdapterTask
from mm_core.training.config import SamplingConfig, StageConfig, TrainingConfig
from mm_core.training.loop import train
from mm_core.training.loop_config import LoopConfig
from mm_core.training.losses import motion_loss

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
        motion_weight=0.25, motion_windows=((0, 2, 1, 3),),
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
    drawn = AdapterTask._draw

    def with_the_pipelines_noise(self: AdapterTask, number: int, whole: bool = False) -> dict[str, Tensor]:
        sample = drawn(self, number, whole)
        shape = (1, *sample["clean"].shape)
        return sample | {"noise": torch.randn(shape, generator=torch.Generator().manual_seed(number))[0]}

    monkeypatch.setattr(AdapterTask, "_draw", with_the_pipelines_noise)
    task.model.eval()
    for number in range(STEPS):
        step(task, number)
    ours = task.state.state_dict()["0"]

    sample = task._draw(0, whole=True)
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
    task = AdapterTask(with_stage(config, identity_start=1, text_dropout=0.0, identity_dropout=0.0), "video")
    away_from_zero(task)
    before = step(task, 0)
    noised = before["noise_loss"] + 0.25 * before["motion_loss"]
    assert torch.equal(before["loss"], noised) and not before["identity_loss"].isfinite().any()
    batch = task.batch(range(BATCH, 2 * BATCH))
    assert len(batch["judged"]) == 0
    judged = batch["rollout"]["timestep"] < 900
    assert 0 < judged.sum() < BATCH
    values = task.model(batch)
    assert torch.equal(values["identity_loss"].isfinite(), judged)
    assert (values["sampled_motion_loss"] > 0).all()
    motion = values["motion_loss"] + values["sampled_motion_loss"]
    added = 0.25 * motion + 0.5 * values["identity_loss"].nan_to_num(0)
    assert torch.allclose(values["loss"], values["noise_loss"] + added)
    task.model.zero_grad()
    (values["loss"] - values["loss"].detach()).sum().backward()
    assert all(p.grad is not None for p in task.model.adapter.blocks["0"].can.parameters())


@torch.no_grad()
def test_a_sampled_clip_is_asked_to_be_the_training_clip(config: TrainingConfig) -> None:
    """In its mean frame, from a noise level on; in motion the base's clip, at all."""
    sampling = replace(config.video.sampling, clean_weight=2.0, clean_from=500)
    task = AdapterTask(with_stage(config, sampling=sampling, text_dropout=0.0, identity_dropout=0.0), "video")
    away_from_zero(task)
    batch = task.batch(range(BATCH))
    rollout = batch["rollout"]
    values = task.model(batch)
    high = rollout["timestep"] >= 500
    assert 0 < high.sum() < BATCH
    assert torch.equal(values["clean_loss"].isfinite(), high)

    scheduler = CogVideoXDDIMScheduler.from_config(task.pipe.scheduler.config)
    scheduler.set_timesteps(STEPS)
    text, state = task.model._identity(rollout, BATCH)
    negative = task.model._predict(rollout, rollout["negative"].expand(BATCH, -1, -1), None)

    def shown(prediction: Tensor) -> Tensor:
        guided = negative + GUIDANCE * (prediction - negative)
        rows = zip(guided, rollout["timestep"], rollout["noisy"], strict=True)
        return torch.stack([scheduler.step(*row).pred_original_sample for row in rows])

    ours = shown(task.model._predict(rollout, text, state))
    base = shown(task.model._predict(rollout, rollout["text"], None))
    apart = (ours.mean(dim=1) - rollout["clean"].mean(dim=1)).square().mean(dim=(1, 2, 3))
    assert torch.allclose(values["clean_loss"][high], apart[high], rtol=1e-3)
    motion = motion_loss(ours, base, task.stage.motion_windows)
    assert torch.allclose(values["sampled_motion_loss"], motion, rtol=1e-3)
    motion = values["motion_loss"] + values["sampled_motion_loss"]
    added = 0.25 * motion + 0.5 * values["identity_loss"].nan_to_num(0) + 2.0 * values["clean_loss"].nan_to_num(0)
    assert torch.allclose(values["loss"], values["noise_loss"] + added)


@torch.no_grad()
def test_the_motion_may_matter_less_at_low_noise(config: TrainingConfig) -> None:
    """Where the base's motion would be another face's."""
    sampling = replace(config.video.sampling, motion_from=500, motion_below=0.5)
    config = with_stage(config, text_dropout=0.0, identity_dropout=0.0)
    values, plain = (
        step(AdapterTask(with_stage(config, sampling=each), "video"), 0) for each in (sampling, config.video.sampling)
    )
    low = AdapterTask(config, "video").batch(range(BATCH))["rollout"]["timestep"] < 500
    assert 0 < low.sum() < BATCH
    less = 0.25 * 0.5 * values["sampled_motion_loss"] * low
    assert torch.allclose(plain["loss"] - values["loss"], less, atol=1e-5)


class _Judge:
    """Knows each clip's number, and judges by it and by what it is shown."""

    def known(self, sample: str) -> dict[str, Tensor]:
        return {"number": torch.tensor(float(sample))}

    def of_clips(self, shown: Tensor, base: Tensor, known: dict[str, Tensor]) -> Tensor:
        return known["number"] * (shown - base).square().mean(dim=(1, 2, 3, 4))

    def of_faces(self, frames: Tensor, landmarks: Tensor, known: dict[str, Tensor]) -> Tensor:
        assert landmarks.shape == (len(frames), 5, 2)
        return 100.0 + known["number"] + 0 * frames.mean(dim=(1, 2, 3))


def test_a_further_judge_of_sampled_clips(config: TrainingConfig) -> None:
    """It is told of the clip whose prompt and person are being sampled; of faces only where the identity is judged."""
    config = with_stage(config, text_dropout=0.0, identity_dropout=0.0)
    plain, judged = AdapterTask(config, "video"), AdapterTask(config, "video", clip_judge=_Judge())
    for task in (plain, judged):
        away_from_zero(task)
    batch = judged.batch(range(BATCH))
    numbers = torch.tensor([float(judged._draw(number, whole=True)["id"]) for number in range(BATCH)])
    assert len(numbers.unique()) == BATCH
    assert torch.equal(batch["rollout"]["known"]["number"], numbers)
    values = judged.model(batch)
    acts = values["identity_loss"].isfinite()
    assert 0 < acts.sum() < BATCH
    assert (values["clip_judge"][numbers > 0] > 0).all()
    with torch.no_grad():
        without = step(plain, 0)["loss"]
    expected = without + values["clip_judge"] + torch.where(acts, 100 + numbers, 0)
    assert torch.allclose(values["loss"], expected, rtol=1e-5)
    gradients = []
    for task in (plain, judged):
        parameter = next(task.model.adapter.blocks["0"].can.parameters())
        loss = task.model(task.batch(range(BATCH)))["loss"].sum()
        gradients.append(torch.autograd.grad(loss, parameter)[0])
    assert not torch.allclose(*gradients)


@torch.no_grad()
def test_the_cosine_may_be_taken_from_the_mean_of_all_photos(config: TrainingConfig) -> None:
    task = AdapterTask(with_stage(config, identity_centred=True), "video")
    photos = [task.features.reference(number)["embedding"] for number in range(len(task.features.references))]
    mean = sum(photo / photo.norm() for photo in photos) / len(photos)
    judge = task.model._judge[0]
    assert torch.allclose(judge.centre, mean, atol=1e-6)
    assert 0.1 < mean.norm() < 0.99
    plain = step(AdapterTask(config, "video"), 0)["identity_loss"]
    ours = step(task, 0)["identity_loss"]
    assert torch.equal(ours.isfinite(), plain.isfinite())
    assert not torch.allclose(ours.nan_to_num(0), plain.nan_to_num(0), atol=1e-3)


def test_a_clip_without_a_face_is_not_judged(config: TrainingConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mm_core.training.step.find_faces", lambda analyzer, frame, recognise: [])
    task = AdapterTask(with_stage(config, text_dropout=0.0, identity_dropout=0.0), "video")
    values = step(task, 0)
    assert not values["identity_loss"].isfinite().any()
    motion = values["motion_loss"] + values["sampled_motion_loss"]
    assert torch.allclose(values["loss"], values["noise_loss"] + 0.25 * motion)


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
    states = [torch.load(path, weights_only=True) for path in last.glob("state_*.pt")]
    assert [sorted(state) for state in states] == [[str(place) for place in range(BATCH)]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(clips=0), r"sampling.clips is 0; it must be a multiple of batch_size"),
        (dict(steps=0), r"sampling.steps is 0; it must be from 1 to 1000"),
        (dict(guidance=0.5), r"sampling.guidance is 0.5; it must be 1 \(off\) or more"),
        (dict(clean_weight=-1.0), r"sampling.clean_weight is -1.0; it must be 0 \(off\) or more"),
        (dict(clean_from=1001), r"sampling.clean_from is 1001; it must be a noise level, 0 to 1000"),
        (dict(motion_from=-1), r"sampling.motion_from is -1; it must be a noise level, 0 to 1000"),
        (dict(motion_below=-0.5), r"sampling.motion_below is -0.5; it must be 0 \(off\) or more"),
    ],
)
def test_wrong_settings(changes: dict[str, float], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        SamplingConfig(**dict(clips=4) | changes)


@pytest.mark.parametrize("name", ["motion_weight", "identity_weight"])
def test_weights_are_not_negative(config: TrainingConfig, name: str) -> None:
    with pytest.raises(SettingError, match=rf"{name} is -1.0; it must be 0 \(off\) or more"):
        with_stage(config, **{name: -1.0})


def test_motion_windows_are_within_the_latents(config: TrainingConfig) -> None:
    for window in ((0, 2, 1), (2, 2, 0, 3), (-1, 2, 0, 3)):
        with pytest.raises(SettingError, match="two rows and two columns, rising"):
            with_stage(config, motion_windows=(window,))
    with pytest.raises(SettingError, match=r"holds \[0, 5, 0, 3\], beyond latents of 4 x 6"):
        AdapterTask(with_stage(config, motion_windows=((0, 5, 0, 3),)), "video")


def test_sampling_wants_an_identity_loss(config: TrainingConfig) -> None:
    with pytest.raises(SettingError, match="set identity_weight above 0"):
        with_stage(config, identity_weight=0.0)
    with pytest.raises(SettingError, match=r"sampling\.clips is 6; it must be a multiple of batch_size, 4"):
        with_stage(config, sampling=SamplingConfig(clips=6))
