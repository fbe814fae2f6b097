"""The small model's adapter: what stands beside the paper's losses, and what its optimizers take."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest
import stand_ins
import torch
import torch.nn.functional as F
from feature_files import write_features
from safetensors.torch import load_file
from tiny_models import ADAPTER_SIZES, save_tiny_folder
from torch import Tensor, nn

from lab.people.manifest import repeats_of
from lab.people.scene import sample_clip
from lab.tiny.adapter import CLEAN_FROM, MOTION_FROM, MOTION_WEIGHT, SampledTask, TinyTask, mean_embedding
from lab.tiny.clips import windows
from lab.tiny.likeness import centred_identity_loss
from lab.tiny.motion import STILLNESS, motion_loss
from lab.tiny.muon import muon
from lab.tiny.pieces import read_state, write_state
from mm_core.errors import MagicMirrorError, SettingError
from mm_core.training.adapter_task import AdapterTask
from mm_core.training.config import SamplingConfig, StageConfig, TrainingConfig
from mm_core.training.diffusion import predict_clean
from mm_core.training.loop import train
from mm_core.training.loop_config import LoopConfig

BATCH, STEPS, GUIDANCE = 4, 4, 3.0
SHAPE = (4, 3, 2, 6, 5)  # B, F, C, H, W


def randoms(count: int, shape: tuple[int, ...] = SHAPE) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


def test_motion_loss_is_the_share_that_is_wrong() -> None:
    still, motion, other = randoms(3)
    still = still.mean(dim=1, keepdim=True).expand_as(motion)
    motion = motion - motion.mean(dim=1, keepdim=True)
    clean = still + motion
    share = motion.square().flatten(1).mean(dim=1)
    share = share / (share + STILLNESS)
    # Another person who moves alike costs nothing; one who stands still, all; one who moves the other way, four times.
    moved = other.mean(dim=1, keepdim=True)
    torch.testing.assert_close(motion_loss(moved + motion, clean), torch.zeros_like(share))
    torch.testing.assert_close(motion_loss(moved.expand_as(clean), clean), share)
    torch.testing.assert_close(motion_loss(moved - motion, clean), 4 * share)


def test_windows_add_their_own_shares() -> None:
    moved, clean = randoms(2)
    inside = moved[..., 1:4, 0:2], clean[..., 1:4, 0:2]
    whole, part = motion_loss(moved, clean), motion_loss(*inside)
    assert torch.equal(motion_loss(moved, clean, [(1, 4, 0, 2)]), whole + part)
    assert torch.equal(motion_loss(moved, clean, [(1, 4, 0, 2)], 0.5), whole + 0.5 * part)


def test_single_pictures_have_no_motion() -> None:
    first, second = randoms(2, shape=(4, 1, 2, 6, 5))
    assert not motion_loss(first, second).any()


def test_from_their_middle_two_people_are_opposite() -> None:
    """And oneself is oneself, whatever the lengths."""
    one, other = (7 * embedding for embedding in randoms(2, shape=(1, 512)))
    centre = (F.normalize(one, dim=-1) + F.normalize(other, dim=-1))[0] / 2
    landmarks = torch.tensor([[[12.0, 12], [20, 12], [16, 16], [13, 20], [19, 20]]])
    for target, loss in ((one, 0.0), (other, 2.0)):
        found = centred_identity_loss(torch.zeros(1, 3, 32, 32), landmarks, 3 * target, lambda faces: one, centre)
        torch.testing.assert_close(found, torch.tensor([loss], dtype=found.dtype))


def test_muon_takes_matrices_and_nothing_else() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(5, 4), "linear": nn.Linear(4, 3), "kernel": nn.Conv2d(3, 2, 3)})
    config = LoopConfig(steps=1, batch_size=1, learning_rate=0.1)
    matrices, rest = muon(model, config)
    assert isinstance(matrices, torch.optim.Muon) and isinstance(rest, torch.optim.AdamW)
    assert [p is model["linear"].weight for group in matrices.param_groups for p in group["params"]] == [True]
    given = [p for group in rest.param_groups for p in group["params"]]
    assert {id(p) for p in given} == {id(p) for p in model.parameters()} - {id(model["linear"].weight)}
    with pytest.raises(SettingError, match="precision of no or bf16"):
        muon(model, LoopConfig(steps=1, batch_size=1, precision="fp16"))


class _Judge:
    """By the row of the features, and by what it is shown."""

    def of_clips(self, shown: Tensor, base: Tensor, rows: Tensor) -> Tensor:
        return (1 + rows) * (shown - base).square().mean(dim=(1, 2, 3, 4))

    def of_faces(self, frames: Tensor, landmarks: Tensor, rows: Tensor) -> Tensor:
        assert landmarks.shape == (len(frames), 5, 2)
        return 100.0 + rows + 0 * frames.mean(dim=(1, 2, 3))


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainingConfig:
    stand_ins.install(monkeypatch.setattr)
    monkeypatch.setattr("lab.tiny.adapter.description", lambda sample: sample_clip(int(sample), 0))
    loop = LoopConfig(steps=6, batch_size=BATCH, ema_decay=0.0)
    stage = StageConfig(
        data="", features=str(write_features(tmp_path / "clips")), frames=9, loop=loop, identity_weight=0.5,
        identity_timesteps=(0, 900), text_dropout=0.0,
        sampling=SamplingConfig(clips=BATCH, steps=STEPS, guidance=GUIDANCE),
    )  # fmt: skip
    image = StageConfig(data="", features=stage.features, frames=1, loop=loop)
    return TrainingConfig(
        base=str(save_tiny_folder("5b", tmp_path / "base")), output=str(tmp_path / "run"), width=48, height=32,
        image=image, video=stage, adapter=ADAPTER_SIZES, validation_people=0,
    )  # fmt: skip


def test_a_clip_comes_up_as_often_as_its_movement_is_rare(config: TrainingConfig) -> None:
    plain, ours = AdapterTask(config, "video"), TinyTask(config, "video")
    counts = [repeats_of(sample_clip(row, 0)) for row in plain.training.tolist()]
    assert max(counts) > 1
    assert [ours.training.tolist().count(row) for row in plain.training] == counts


def test_what_a_sampled_clip_is_asked_for(config: TrainingConfig) -> None:
    """The sum of its parts, each where it acts; the base's part is made of the base alone, guided alike."""
    task = SampledTask(config, "video", judge=_Judge())
    torch.manual_seed(0)
    for parameter in task.model.adapter.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    batch = task.batch(range(BATCH))
    values = task.model(batch)
    rollout, model = batch["rollout"], task.model
    high = rollout["timestep"] >= CLEAN_FROM
    assert torch.equal(values["clean_loss"].isfinite(), high)
    assert torch.equal(values["identity_loss"].isfinite(), rollout["timestep"] < 900)
    with torch.no_grad():
        negative = model.predict(rollout, rollout["negative"].expand(BATCH, -1, -1), None)
        shown = [
            predict_clean(negative + GUIDANCE * (said - negative), rollout["noisy"], rollout["alpha_bar"])
            for said in (
                model.predict(rollout, *model.identity(rollout)),
                model.predict(rollout, rollout["text"], None),
            )
        ]
    ours, base = shown
    apart = (ours.mean(dim=1) - rollout["clean"].mean(dim=1)).square().mean(dim=(1, 2, 3))
    assert torch.allclose(values["clean_loss"][high], apart[high], rtol=1e-3)
    assert torch.allclose(values["pose_loss"], _Judge().of_clips(ours, base, rollout["row"]), rtol=1e-3)
    motion = torch.where(rollout["timestep"] < MOTION_FROM, 0.6, 1) * motion_loss(ours, base, windows(4, 6))
    assert torch.allclose(values["sampled_motion_loss"], motion, rtol=1e-3)
    assert (values["identity_loss"].nan_to_num(1000) > (100 + rollout["row"]) / 0.5).all()
    added = MOTION_WEIGHT * (values["motion_loss"] + values["sampled_motion_loss"]) + values["pose_loss"]
    added = added + 3.0 * values["clean_loss"].nan_to_num(0) + 0.5 * values["identity_loss"].nan_to_num(0)
    assert torch.allclose(values["loss"], values["noise_loss"] + added, rtol=1e-4)
    values["loss"].sum().backward()
    assert all(p.grad is not None for p in model.adapter.blocks["0"].can.parameters())


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_a_piece_goes_on_from_a_file_as_if_nothing_had_been(
    config: TrainingConfig, tmp_path: Path, decay: float
) -> None:
    """Bit for bit, with the clips in the making."""
    loop = replace(config.video.loop, steps=2, ema_decay=decay)
    config = replace(config, video=replace(config.video, loop=loop))
    stop, name, state = threading.Event(), "sampled/video", tmp_path / "state.tar"

    def piece(folder: Path) -> Path:
        return train(SampledTask(config, "video", judge=_Judge()), loop, folder / name, stop)

    unbroken = piece(tmp_path / "unbroken")
    stop.set()
    with pytest.raises(KeyboardInterrupt):
        piece(tmp_path / "first")
    write_state(tmp_path / "first", state, 60)
    read_state(state, tmp_path / "second")
    stop.clear()
    last = piece(tmp_path / "second")
    for read, file in ((load_file, "adapter.safetensors"), (torch.load, "state.pt")):
        torch.testing.assert_close(read(last / file), read(unbroken / file), rtol=0, atol=0)
    assert (last / "optimizer.bin").read_bytes() == (unbroken / "optimizer.bin").read_bytes()
    # Of what is finished others read the adapter alone.
    write_state(tmp_path / "second", state, 60)
    read_state(state, tmp_path / "third")
    kept = sorted(path.name for path in (tmp_path / "third" / name).rglob("*.*"))
    assert kept == ["adapter.safetensors", "settings.json"]
    before = state.read_bytes()
    with pytest.raises(MagicMirrorError, match=r"would have 0\.\d MiB, more than --limit 0\.01, and was not written"):
        write_state(tmp_path / "second", state, 0.01)
    assert state.read_bytes() == before


def test_the_middle_is_the_mean_of_all_photos(config: TrainingConfig) -> None:
    features = AdapterTask(config, "video").features
    photos = [features.reference(number)["embedding"] for number in range(len(features.references))]
    assert torch.allclose(mean_embedding(features), sum(photo / photo.norm() for photo in photos) / len(photos))
