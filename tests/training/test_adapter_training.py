"""The adapter's training: what learns, what stays frozen, what is dropped, and that both stages hang together."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerator import simulated
from adapter_runs import losses, train_on_two_processes, with_stage
from feature_files import write_features
from stand_ins import LinearView
from tiny_models import ADAPTER_SIZES, save_tiny_folder
from torch import Tensor, nn

from mm_core.checkpoints.adapter_file import expected_tensors, load_adapter
from mm_core.data.features import INDEX
from mm_core.errors import CheckpointError, SettingError
from mm_core.hosts.cogvideox_diffusers import STATE
from mm_core.training import validation
from mm_core.training.__main__ import main, train_stage
from mm_core.training.adapter_task import ADAPTER_FILE, AdapterTask
from mm_core.training.config import ABLATIONS, StageConfig, TrainingConfig
from mm_core.training.loop import train
from mm_core.training.loop_config import LoopConfig
from mm_core.training.losses import noise_loss
from mm_core.training.runs import latest_checkpoint

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small base model in diffusers' layout."""
    return save_tiny_folder("5b", tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("features")
    write_features(folder / "clips")
    write_features(folder / "pictures", pictures=True)
    return folder


@pytest.fixture
def config(base: Path, features: Path, tmp_path: Path) -> TrainingConfig:
    loop = LoopConfig(steps=4, batch_size=4, learning_rate=1e-3, ema_decay=0.0, log_every=1, save_every=2, keep=9)
    stages = {
        name: StageConfig(data="", features=str(features / folder), frames=frames, loop=loop, max_references=2)
        for name, folder, frames in (("image", "pictures", 1), ("video", "clips", 9))
    }
    return TrainingConfig(
        base=str(base), output=str(tmp_path / "run"), width=48, height=32, adapter=ADAPTER_SIZES, **stages
    )


def hashes(modules: dict[str, nn.Module]) -> dict[str, str]:
    return {
        f"{part}.{name}": hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
        for part, module in modules.items()
        for name, tensor in module.state_dict().items()
    }


def test_without_identity_the_loss_is_the_bases(config: TrainingConfig) -> None:
    """At any weights: samples that dropped their identity run as the plain base, and teach nothing."""
    task = AdapterTask(with_stage(config, text_dropout=0.0, identity_dropout=0.999, face_area=0.0), "video")
    batch = task.batch(range(4))
    assert len(batch["id_tokens"]) == 0
    values = task.model(batch)
    prediction = task.base.load(torch.float32).transformer(
        hidden_states=batch["noisy"],
        encoder_hidden_states=batch["text"],
        timestep=batch["timestep"],
        image_rotary_emb=(batch["cos"], batch["sin"]),
    )[0]
    expected = noise_loss(prediction, batch["clean"], batch["noise"], batch["alpha_bar"])
    assert torch.equal(values["base_loss"], expected.detach())
    values["loss"].mean().backward()
    assert not any(p.grad is not None and p.grad.any() for p in task.model.parameters())


def test_a_fresh_adapter_leaves_the_text_alone(config: TrainingConfig) -> None:
    task = AdapterTask(with_stage(config, text_dropout=0.5, identity_dropout=0.0), "video")
    batch = task.batch(range(8))
    assert not batch["has_text"].all() and batch["has_text"].any()
    text, _ = task.model._identity(batch, 8)
    assert torch.equal(text, batch["text"])


def test_text_fusion_touches_the_slots_of_kept_prompts_only(config: TrainingConfig) -> None:
    task = AdapterTask(with_stage(config, text_dropout=0.5, identity_dropout=0.0), "video")
    for parameter in task.model.adapter.id_fusion.parameters():
        nn.init.normal_(parameter)
    batch = task.batch(range(8))
    text, _ = task.model._identity(batch, 8)
    changed = (text != batch["text"]).any(dim=-1)
    expected = torch.zeros_like(changed).scatter(1, batch["slots"], True) & batch["has_text"][:, None]
    assert torch.equal(changed, expected)


def test_a_sample_comes_up_as_often_as_its_manifest_says(config: TrainingConfig, tmp_path: Path) -> None:
    folder = write_features(tmp_path / "features")
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    index["samples"][1]["repeat"] = 3
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")
    task = AdapterTask(with_stage(config, features=str(folder)), "video")
    once_through = task.batch(range(len(index["samples"]) + 2))["clean"]
    latents = [task.features.sample(row)["latents"].float() for row in range(3)]
    assert [sum(torch.equal(clean, sample) for clean in once_through) for sample in latents] == [1, 3, 1]


def test_only_the_adapter_learns(config: TrainingConfig) -> None:
    """Every key of the checkpoint format gets a gradient, but for the norm that nobody reads; nothing else does."""
    task = AdapterTask(with_stage(config, text_dropout=0.0, identity_dropout=0.0), "video")
    frozen = {"transformer": task.pipe.transformer, "vae": task.pipe.vae}
    before = hashes(frozen)
    folder = Path(config.output) / "video"
    train(task, config.video.loop, folder)
    assert hashes(frozen) == before

    task.model(task.batch(range(4)))["loss"].mean().backward()
    with_gradient = {name for name, p in task.model.named_parameters() if p.grad is not None and p.grad.any()}
    last = task.model.adapter.config.adapted_layers[-1]
    unread = {f"adapter.blocks.{last}.face_norm2.{name}" for name in ("weight", "bias")}
    assert with_gradient == {f"adapter.{key}" for key in expected_tensors(task.model.adapter.config)} - unread


def test_exported_adapter(config: TrainingConfig) -> None:
    """The checkpoint's adapter is the format others read, and says what it has been through."""
    path = train_stage(replace(config, ablation="G"), "video")
    adapter, header = load_adapter(path)
    assert (header.trained.stage, header.trained.steps) == ("video", 4)
    assert header.base_model == "base"
    assert adapter.state_dict().keys() == expected_tensors(header.config).keys()


@pytest.mark.parametrize("kind", ["2b", "1.5"])
def test_other_bases(config: TrainingConfig, tmp_path: Path, kind: str) -> None:
    """A base without rotary positions; one that patches in time, whose single pictures are padded to a whole patch."""
    task = AdapterTask(replace(config, base=str(save_tiny_folder(kind, tmp_path / kind))), "image")
    batch = task.batch(range(4))
    assert batch["clean"].shape[1] == (2 if kind == "1.5" else 1)
    assert ("cos" in batch) == (kind == "1.5")
    assert task.model(batch)["loss"].isfinite().all()


def test_stages_hand_over_weights_not_optimizer(config: TrainingConfig) -> None:
    with pytest.raises(SettingError, match=r"The image stage in .* is not finished"):
        train_stage(config, "video")
    image = load_adapter(train_stage(config, "image"))[0].state_dict()
    task = AdapterTask(config, "video", latest_checkpoint(Path(config.output) / "image") / ADAPTER_FILE)
    assert all(torch.equal(tensor, image[name]) for name, tensor in task.model.adapter.state_dict().items())
    assert train_stage(config, "video").is_file()


def test_resume(config: TrainingConfig) -> None:
    """A stage that stopped after two steps goes on to the same weights, dropout and references included."""
    loop = config.video.loop
    whole = train(AdapterTask(config, "video"), loop, Path(config.output) / "whole")
    cut = Path(config.output) / "cut"
    train(AdapterTask(config, "video"), loop, cut)
    for checkpoint in (cut / "checkpoints").glob("step-*[34]"):
        for file in checkpoint.iterdir():
            file.unlink()
        checkpoint.rmdir()
    again = train(AdapterTask(config, "video"), loop, cut)
    assert losses(cut) == losses(whole.parents[1])
    ours, theirs = (load_adapter(path / ADAPTER_FILE)[0].state_dict() for path in (again, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_two_processes_equal_one(config: TrainingConfig, tmp_path: Path) -> None:
    """The same global batch on two processes: the same losses, also where a process has samples without identity."""
    config = with_stage(config, identity_dropout=0.4)
    train(AdapterTask(config, "video"), config.video.loop, tmp_path / "one")
    train_on_two_processes(config, tmp_path / "two")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


@pytest.mark.parametrize("row", sorted(ABLATIONS))
def test_ablations(config: TrainingConfig, row: str) -> None:
    """What a row of Tab. 3 switches off gets no gradient; what it keeps does."""
    config = with_stage(config, text_dropout=0.0, identity_dropout=0.0)
    task = AdapterTask(replace(config, ablation=row), "video")
    # Away from the initial zeros, behind which nothing gets a gradient.
    for parameter in task.model.adapter.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    task.model(task.batch(range(4)))["loss"].mean().backward()
    seen = {name for name, p in task.model.adapter.named_parameters() if p.grad is not None and p.grad.any()}
    parts = {"fusion": "id_fusion.", "perceiver": "face_perceiver.", "cross": "attn."}
    parts |= {"can": ".can.", "face": ".face_modulation."}
    off = {
        "A": {"perceiver", "cross", "face"}, "B": {"fusion"}, "C": {"can", "face"}, "D": {"can"}, "E": {"face"},
        "F": {"can", "face"},
    }.get(row, set())  # fmt: skip
    for part, text in parts.items():
        assert any(text in name for name in seen) == (part not in off), part


def test_gradient_checkpointing_changes_nothing(config: TrainingConfig) -> None:
    gradients = []
    for checkpointing in (False, True):
        task = AdapterTask(replace(config, gradient_checkpointing=checkpointing), "video")
        task.model.train()
        task.model(task.batch(range(4)))["loss"].mean().backward()
        gradients.append({n: p.grad.clone() for n, p in task.model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(tensor, gradients[1][name]) for name, tensor in gradients[0].items())


def test_identity_loss_acts_where_it_should(config: TrainingConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """From its step on, at its noise levels, on samples with an identity; and it is free when it is off."""
    assert AdapterTask(config, "video").model._judge == (None,)
    monkeypatch.setattr("mm_core.training.adapter_task.recogniser_file", lambda config: Path())
    monkeypatch.setattr("mm_core.training.adapter_task.DifferentiableArcFace", lambda path: LinearView())
    config = with_stage(config, identity_weight=0.5, identity_start=1, identity_timesteps=(0, 600))
    config = with_stage(config, text_dropout=0.0, identity_dropout=0.3)
    task = AdapterTask(config, "video")
    assert len(task.batch(range(4))["judged"]) == 0  # step 0
    batch = task.batch(range(4, 16))
    assert 0 < len(batch["judged"]) < 12
    assert (batch["timestep"][batch["judged"]] < 600).all()
    assert (batch["judged"] >= 12 - len(batch["id_tokens"])).all()
    values = task.model(batch)
    judged = torch.zeros(12, dtype=torch.bool).index_fill(0, batch["judged"], True)
    assert torch.equal(values["identity_loss"].isfinite(), judged)
    noise = values["noise_loss"].nan_to_num(0) + values["base_loss"].nan_to_num(0)
    assert torch.equal(values["loss"][~judged], noise[~judged])
    difference = values["loss"][judged] - values["noise_loss"][judged]
    assert torch.allclose(difference, 0.5 * values["identity_loss"][judged], atol=1e-6)
    values["loss"].mean().backward()


def test_eight_clips_are_learnt_by_heart(config: TrainingConfig) -> None:
    """The clips are what another adapter makes of the same base and photos, so that the loss can fall to zero."""
    loop = replace(config.video.loop, steps=1000, batch_size=8, learning_rate=4e-3, log_every=50, save_every=1000)
    config = with_stage(config, loop=loop, text_dropout=0.0, identity_dropout=0.0, face_area=0.0, max_references=1)
    config = replace(config, validation_people=0)
    teacher, student = AdapterTask(config, "video"), AdapterTask(config, "video")
    for parameter in teacher.model.adapter.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    batch = teacher.batch(range(8))
    with torch.no_grad():
        text, state = teacher.model._identity(batch, 8)
        v = teacher.pipe.transformer(
            hidden_states=batch["noisy"], encoder_hidden_states=text, timestep=batch["timestep"],
            image_rotary_emb=(batch["cos"], batch["sin"]), attention_kwargs={STATE: state},
        )[0]  # fmt: skip
    alpha_bar = batch["alpha_bar"].float().view(8, 1, 1, 1, 1)
    signal, deviation = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    # The clip and noise of which `noisy` and this v are.
    batch["clean"] = signal * batch["noisy"] - deviation * v
    batch["noise"] = deviation * batch["noisy"] + signal * v
    student.batch = lambda samples: batch
    train(student, loop, Path(config.output))
    measured = losses(Path(config.output))
    assert measured[-1] < 0.05 * measured[0], measured


def test_what_is_missing_is_said(config: TrainingConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CheckpointError, match="do not exist yet"):
        AdapterTask(with_stage(config, features=str(tmp_path / "none")), "video")
    with pytest.raises(SettingError, match="holds no recogniser"):
        AdapterTask(with_stage(replace(config, insightface_root=str(tmp_path)), identity_weight=0.1), "video")
    (tmp_path / "bad.yaml").write_text("base: tiny\nbatch: 4\n", encoding="utf-8")
    assert main(["plan", "--config", str(tmp_path / "bad.yaml")]) == 2
    assert "unknown batch; missing height, image, output, video, width" in capsys.readouterr().err


def test_validation_makes_a_clip_of_each_person(
    config: TrainingConfig, insightface_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the weights that are being trained, and leaves the model as it was; in noise there is no face."""
    monkeypatch.setattr(validation, "STEPS", 2)
    config = replace(config, insightface_root=str(insightface_root), face_pack="buffalo_sc", validation_people=1)
    task = AdapterTask(config, "video")
    before = hashes({"adapter": task.model.adapter, "base": task.pipe.transformer})
    values = task.validate(1, tmp_path)
    assert values["face_rate"] == 0 and math.isnan(values["id_similarity"])
    assert [path.name for path in sorted(tmp_path.glob("*.mp4"))] == ["00.mp4"]
    assert hashes({"adapter": task.model.adapter, "base": task.pipe.transformer}) == before


def test_a_judged_step_on_a_device(config: TrainingConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the model is, its judge is too, also after validation had lent the VAE elsewhere: loss and gradients are
    those of the CPU, in either stage."""
    monkeypatch.setattr("mm_core.training.adapter_task.recogniser_file", lambda config: Path())
    monkeypatch.setattr("mm_core.training.adapter_task.DifferentiableArcFace", lambda path: LinearView())
    changes = dict(identity_weight=0.5, identity_timesteps=(0, 1000), text_dropout=0.0, identity_dropout=0.0)
    config = replace(config, gradient_checkpointing=True)
    for stage in ("image", "video"):
        task = AdapterTask(with_stage(config, stage, **changes), stage)
        batch = task.batch(range(4))
        assert len(batch["judged"])

        def gradients(batch: dict[str, Tensor], model: nn.Module = task.model) -> list[Tensor]:
            model.zero_grad()
            loss = model(batch)["loss"].mean()
            loss.backward()
            return [loss.detach(), *(p.grad for p in model.adapter.parameters() if p.grad is not None)]

        expected = [tensor.clone() for tensor in gradients(batch)]
        with simulated() as accelerator:
            task.model.to(accelerator.device)
            for _ in range(2):
                found = gradients({name: value.to(accelerator.device) for name, value in batch.items()})
                for ours, theirs in zip(found, expected, strict=True):
                    assert torch.allclose(ours.cpu(), theirs, rtol=1e-4, atol=1e-6)
                task.pipe.vae.to("cpu")
