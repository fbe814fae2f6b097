"""The adapter's training: what learns, what stays frozen, what is dropped, and that both stages hang together."""

from __future__ import annotations

import ast
import gc
import hashlib
import json
import math
import os
import re
import shutil
import time
import weakref
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import stand_ins
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
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
from mm_core.models.block import FaceState
from mm_core.release.commands import main
from mm_core.release.publish import export, exported
from mm_core.training import validation
from mm_core.training.adapter_task import ADAPTER_FILE, AdapterTask, train_stage
from mm_core.training.config import ABLATIONS, SamplingConfig, StageConfig, TrainingConfig
from mm_core.training.loop import train
from mm_core.training.loop_config import LoopConfig
from mm_core.training.runs import METRICS, SETTINGS, check_settings, latest_checkpoint
from mm_core.training.sample_losses import IdentityLoss, NoiseLoss, decode_frame
from mm_core.training.step import AdapterTraining

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


def test_a_fresh_adapter_leaves_the_text_alone(config: TrainingConfig) -> None:
    task = AdapterTask(with_stage(config, text_dropout=0.5), "video")
    batch = task.batch(range(8))
    assert not batch["has_text"].all() and batch["has_text"].any()
    text, _ = task.model.identity(batch)
    assert torch.equal(text, batch["text"])


def test_text_fusion_touches_the_slots_of_kept_prompts_only(config: TrainingConfig) -> None:
    task = AdapterTask(with_stage(config, text_dropout=0.5), "video")
    for parameter in task.model.adapter.id_fusion.parameters():
        nn.init.normal_(parameter)
    batch = task.batch(range(8))
    text, _ = task.model.identity(batch)
    changed = (text != batch["text"]).any(dim=-1)
    expected = torch.zeros_like(changed).scatter(1, batch["slots"], True) & batch["has_text"][:, None]
    assert torch.equal(changed, expected)


def test_only_the_adapter_learns(config: TrainingConfig) -> None:
    """Every key of the checkpoint format gets a gradient, but for the norm that nobody reads; nothing else does."""
    task = AdapterTask(with_stage(config, text_dropout=0.0), "video")
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


def test_exported_adapter(config: TrainingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint's adapter is the format others read, and says what it has been through."""
    monkeypatch.setenv("HOME", str(tmp_path))
    config = replace(config, ablation="G", output="~/run")
    path = train_stage(config, "video")
    assert path.is_relative_to(tmp_path / "run" / "video")
    adapter, header = load_adapter(path)
    assert (header.trained.stage, header.trained.steps) == ("video", 4)
    assert header.base_model == "base"
    assert adapter.state_dict().keys() == expected_tensors(header.config).keys()
    half = export(config)
    assert exported(config) == (half, True)
    os.utime(path, (time.time() + 1,) * 2)  # as if the folder had been emptied, and trained anew by as many steps
    assert exported(config) == (half, False)


@pytest.mark.parametrize("kind", ["2b", "1.5"])
def test_other_bases(config: TrainingConfig, tmp_path: Path, kind: str) -> None:
    """A base without rotary positions; one that patches in time, whose single pictures are padded to a whole patch."""
    task = AdapterTask(replace(config, base=str(save_tiny_folder(kind, tmp_path / kind))), "image")
    batch = task.batch(range(4))
    assert batch["clean"].shape[1] == (2 if kind == "1.5" else 1)
    assert ("cos" in batch) == (kind == "1.5")
    assert task.model(batch)["loss"].isfinite().all()


def test_nobody_who_is_scored_is_trained_on(config: TrainingConfig, tmp_path: Path) -> None:
    """The last person's clips were dropped: whom the video stage leaves out instead, the image stage does as well."""
    folder = shutil.copytree(config.video.features, tmp_path / "clips")
    index = json.loads((folder / INDEX).read_text())
    index["samples"] = [entry for entry in index["samples"] if entry["person"] != "p3"]
    (folder / INDEX).write_text(json.dumps(index))
    config = with_stage(replace(config, validation_people=1), features=str(folder))
    for stage, left_out in (("image", "p3"), ("video", "p2")):
        task = AdapterTask(config, stage)
        trained, validated = (
            {task.features.entries[row]["person"] for row in rows} for rows in (task.training, task.validation)
        )
        assert (trained, validated) == ({"p0", "p1"}, {left_out})


def test_stages_hand_over_weights_not_optimizer(config: TrainingConfig) -> None:
    with pytest.raises(SettingError, match=r"The image stage in .* is not finished"):
        train_stage(config, "video")
    image = load_adapter(train_stage(config, "image"))[0].state_dict()
    task = AdapterTask(config, "video", latest_checkpoint(Path(config.output) / "image") / ADAPTER_FILE)
    assert all(torch.equal(tensor, image[name]) for name, tensor in task.model.adapter.state_dict().items())
    assert train_stage(config, "video").is_file()


@pytest.mark.parametrize("small", [False, True], ids=["", "quantised"])
def test_resume(config: TrainingConfig, small: bool) -> None:
    """A stage that stopped after two steps goes on to the same weights, dropout and references included; with all that
    saves memory too."""
    loop = replace(config.video.loop, use_8bit_adam=small)
    config = replace(config, fp8_base=small, gradient_checkpointing=small)
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
    state = torch.load(again / "optimizer.bin", weights_only=True)["state"].values()
    quantised = [entry.get("__bnb_optimizer_quant_state__", {}).get("state1") for entry in state]
    assert any(moment is not None and moment.dtype == torch.uint8 for moment in quantised) == small


def other(value: object) -> object:
    """One that is as valid."""
    if isinstance(value, str):
        return {"no": "bf16", "ours": "A"}.get(value, "other")
    if isinstance(value, tuple):
        return (0, 250) if value else (3,)
    if isinstance(value, bool):
        return not value
    return (value / 2 or 0.5) if isinstance(value, float) else 2 * (value or 1)


def test_every_setting_that_changes_the_numbers_is_refused_by_name(config: TrainingConfig, tmp_path: Path) -> None:
    """A run goes on with others only where they leave the numbers alone, or help a run that cannot go on."""
    task = AdapterTask(config, "video")
    task.stage = replace(config.video, identity_weight=0.1, sampling=SamplingConfig(clips=8))

    def settings() -> dict[str, object]:
        return {**task.settings, **asdict(task.stage.loop)}

    (tmp_path / SETTINGS).write_text(json.dumps(settings()))
    check_settings(tmp_path, settings())
    assert {f"features.{name}" for name in task.features.settings} < settings().keys()
    whole, stage, taken = task.config, task.stage, set()
    changes = [
        (name, replace(whole, **{name: other(getattr(whole, name))}), stage)
        for name in ("ablation", "fp8_base", "face_pack")
    ]
    for part, inside in (("", stage), ("loop", stage.loop), ("sampling", stage.sampling)):
        for name in (field.name for field in fields(inside) if field.name not in ("loop", "sampling")):
            changed = replace(inside, **{name: other(getattr(inside, name))})
            changes.append((name, whole, replace(stage, **{part: changed}) if part else changed))
    for name, task.config, task.stage in changes:
        try:
            check_settings(tmp_path, settings())
        except SettingError as error:
            assert f"a run with {name} " in str(error) or f"{name}':" in str(error)
        else:
            taken.add(name)
    assert taken == {
        *("data", "features"),  # where files are: what is in them is compared
        *("log_every", "save_every", "keep", "validate_every", "compile", "micro_batch", "workers"),
        *("learning_rate", "final_learning_rate", "skip_steps"),
    }


def test_every_setting_is_read_and_documented() -> None:
    """No field of the configs that training does not read, or that neither a recipe nor the documentation names."""
    package = ROOT / "mm_core" / "training"
    sources = [path for path in package.glob("*.py") if path.name != "config.py"]  # which checks them
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (*sources, *package.glob("../release/*.py"))]
    read = {node.attr for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    texts = [ROOT / "docs" / "training.md", *package.glob("configs/*.yaml")]
    told = {word for path in texts for word in re.findall(r"\w+", path.read_text(encoding="utf-8"))}
    for kind in (TrainingConfig, StageConfig, LoopConfig, SamplingConfig):
        names = {field.name for field in fields(kind)}
        assert names <= read and names <= told


def test_two_processes_equal_one(config: TrainingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same global batch on two processes: the same losses; three people validated by both: the same scores."""
    stand_ins.install_validation(monkeypatch.setattr)
    config = replace(config, validation_people=3, fp8_base=True)
    config = with_stage(config, loop=replace(config.video.loop, validate_every=4))
    train(AdapterTask(config, "video"), config.video.loop, tmp_path / "one")
    train_on_two_processes(config, tmp_path / "two", "import stand_ins; stand_ins.install_validation()")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    found, expected = (
        json.loads((tmp_path / name / METRICS).read_text(encoding="utf-8").splitlines()[-1]) for name in ("two", "one")
    )
    assert {"validation/id_similarity", "validation/noise_loss", "validation/base_loss"} < found.keys()
    assert found == pytest.approx(expected, rel=1e-4)
    clips = sorted(path.name for path in (tmp_path / "two").rglob("*.mp4"))
    assert clips == ["00.mp4", "01.mp4", "02.mp4"]


@pytest.mark.parametrize("row", sorted(ABLATIONS))
def test_ablations(config: TrainingConfig, row: str) -> None:
    """What a row of Tab. 3 switches off gets no gradient; what it keeps does."""
    config = with_stage(config, text_dropout=0.0)
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


@pytest.mark.parametrize("row", ["ours", "A"])
def test_gradient_checkpointing_changes_nothing(
    config: TrainingConfig, row: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And keeps nothing of a step that is over."""
    gradients, states, identity = [], [], AdapterTraining.identity

    def remembered(model: AdapterTraining, batch: dict[str, Tensor]) -> tuple[Tensor, FaceState]:
        text, state = identity(model, batch)
        states.append(weakref.ref(state))
        return text, state

    monkeypatch.setattr(AdapterTraining, "identity", remembered)
    for checkpointing in (False, True):
        task = AdapterTask(replace(config, gradient_checkpointing=checkpointing, ablation=row), "video")
        task.model.train()
        task.model(task.batch(range(4)))["loss"].mean().backward()
        gradients.append({n: p.grad.clone() for n, p in task.model.named_parameters() if p.grad is not None})
    gc.collect()
    assert [state() for state in states] == [None, None]
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(tensor, gradients[1][name]) for name, tensor in gradients[0].items())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_through_an_fp8_base(config: TrainingConfig, checkpointing: bool) -> None:
    """They are those through the base whose weights are what the 8-bit floats say."""
    config = replace(config, gradient_checkpointing=checkpointing)
    gradients = []
    for fp8 in (True, False):
        task = AdapterTask(replace(config, fp8_base=fp8), "video")
        if fp8:
            stored = {name: p.float() for name, p in task.pipe.transformer.named_parameters()}
            assert {p.dtype for p in task.pipe.transformer.parameters()} == {torch.float8_e4m3fn, torch.float32}
        else:
            task.pipe.transformer.load_state_dict(stored, strict=False)
        task.model.train()
        task.model(task.batch(range(4)))["loss"].mean().backward()
        gradients.append({n: p.grad.clone() for n, p in task.model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(tensor, gradients[1][name]) for name, tensor in gradients[0].items())


def test_identity_loss_acts_where_it_should(config: TrainingConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """From its step on, at its noise levels; and it is free when it is off."""
    assert [type(loss) for loss in AdapterTask(config, "video").model.losses] == [NoiseLoss]
    monkeypatch.setattr("mm_core.training.adapter_task.recogniser_file", lambda config: Path())
    monkeypatch.setattr("mm_core.training.adapter_task.DifferentiableArcFace", lambda path: LinearView())
    config = with_stage(config, identity_weight=0.5, identity_start=1, identity_timesteps=(0, 600))
    config = with_stage(config, text_dropout=0.0)
    task = AdapterTask(config, "video")
    assert len(task.batch(range(4))["judged"]) == 0  # step 0
    batch = task.batch(range(4, 16))
    assert 0 < len(batch["judged"]) < 12
    assert (batch["timestep"][batch["judged"]] < 600).all()
    values = task.model(batch)
    judged = torch.zeros(12, dtype=torch.bool).index_fill(0, batch["judged"], True)
    assert torch.equal(values["identity_loss"].isfinite(), judged)
    assert torch.equal(values["loss"][~judged], values["noise_loss"][~judged])
    difference = values["loss"][judged] - values["noise_loss"][judged]
    assert torch.allclose(difference, 0.5 * values["identity_loss"][judged], atol=1e-6)
    values["loss"].mean().backward()


def test_eight_clips_are_learnt_by_heart(config: TrainingConfig) -> None:
    """The clips are what another adapter makes of the same base and photos, so that the loss can fall to zero."""
    loop = replace(config.video.loop, steps=200, batch_size=8, learning_rate=4e-3, log_every=20, save_every=200)
    config = with_stage(config, loop=loop, text_dropout=0.0, face_area=0.0, max_references=1)
    config = replace(config, validation_people=0)
    teacher, student = AdapterTask(config, "video"), AdapterTask(config, "video")
    for parameter in teacher.model.adapter.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    batch = teacher.batch(range(8))
    with torch.no_grad():
        text, state = teacher.model.identity(batch)
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


def test_both_stages_on_a_device(
    config: TrainingConfig, insightface_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Judged steps under checkpointing, in bf16, a validation, and a resume: everything is where it belongs, and the
    first loss is the CPU's. The VAE is judged through again after validation had lent it elsewhere."""
    monkeypatch.setattr("mm_core.training.adapter_task.recogniser_file", lambda config: Path())
    monkeypatch.setattr("mm_core.training.adapter_task.DifferentiableArcFace", lambda path: LinearView())
    monkeypatch.setattr(validation, "STEPS", 1)
    config = replace(
        config, gradient_checkpointing=True, fp8_base=True, validation_people=1, insightface_root=str(insightface_root),
        face_pack="buffalo_sc",
    )  # fmt: skip
    config = replace(config, ablation="G")  # which begins stage 2 anew
    for stage in ("image", "video"):
        loop = replace(
            getattr(config, stage).loop, precision="bf16", steps=2, save_every=1, validate_every=2 * (stage == "video")
        )
        config = with_stage(config, stage, identity_weight=0.5, identity_timesteps=(0, 1000), loop=loop)
        task = AdapterTask(config, stage)
        batch = task.batch(range(4))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            expected = task.model(batch)["loss"].mean()
        with simulated() as accelerator:
            AcceleratorState._reset_state(reset_partial_state=True)
            PartialState().device = accelerator.device
            last = train_stage(config, stage).parent
            assert accelerator.traffic["bytes to device"] > 0
            gone = last.rename(last.parents[1] / "gone")
            again = train_stage(config, stage)
            AcceleratorState._reset_state(reset_partial_state=True)
        assert losses(Path(config.output) / stage)[0] == pytest.approx(float(expected), rel=1e-2)
        ours, theirs = (load_adapter(path)[0].state_dict() for path in (again, gone / ADAPTER_FILE))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert "validation/base_loss" in (Path(config.output) / "video" / METRICS).read_text(encoding="utf-8")


def test_a_judged_frame_is_nearly_the_whole_clips(config: TrainingConfig) -> None:
    """Behind the frames before it; decoded by itself it is another picture."""
    vae = AdapterTask(config, "video").pipe.vae
    latents = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    judged = torch.tensor([2, 0])
    with torch.no_grad():
        whole = vae.decode((latents / vae.config.scaling_factor).transpose(1, 2)).sample / 2 + 0.5
        found = IdentityLoss(1.0, vae, LinearView()).frames(latents, judged)
        alone = decode_frame(vae, latents[:1, 2:])
    wanted = whole[torch.arange(2), :, 4 * judged]
    assert torch.allclose(found[1], decode_frame(vae, latents[1:, :1])[0], atol=1e-5)
    assert (found[0] - wanted[0]).square().mean() < (alone[0] - wanted[0]).square().mean()


def test_a_checkpoint_has_the_adapter_once(config: TrainingConfig) -> None:
    """Its average, or without one the weights themselves, are in the adapter's file only; a resume finds them."""
    for decay, kept in ((0.0, set()), (0.5, {"trainable.safetensors", "average.pt"})):
        loop = replace(config.video.loop, ema_decay=decay)
        folder = Path(config.output) / f"{decay}"
        last = train(AdapterTask(config, "video"), loop, folder)
        names = {path.name for path in last.iterdir()}
        assert names == kept | {ADAPTER_FILE, "optimizer.bin", "random_states_0.pkl"}
        if kept:
            assert (last / "average.pt").stat().st_size < 0.1 * (last / ADAPTER_FILE).stat().st_size
        whole = losses(folder)
        last.rename(folder / "gone")
        again = train(AdapterTask(config, "video"), loop, folder)
        assert losses(folder) == whole
        ours, theirs = (load_adapter(path / ADAPTER_FILE)[0].state_dict() for path in (again, folder / "gone"))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
