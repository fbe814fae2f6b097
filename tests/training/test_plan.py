"""The planner counts what really happens: against known sizes, formulae, and the peak of a simulated device."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import stand_ins
import torch
import untrained_tiny
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerator import simulated
from torch import nn

from mm_core.counting import GpuKernels
from mm_core.errors import SettingError
from mm_core.models.adapter import MagicMirrorAdapter
from mm_core.pipelines import tiny
from mm_core.planning.plan import Memory, Plan, plan
from mm_core.planning.rehearse import RehearsedTask, write_features
from mm_core.planning.step import DryStep, build_models
from mm_core.training.config import TrainingConfig, load_config
from mm_core.training.loop import train
from mm_core.training.optimizer import adamw

RECIPE = Path(__file__).parents[2] / "mm_core" / "training" / "configs" / "cogvideox_5b.yaml"
SMALL = dict(base="tiny", width="64", height="48", video__frames="9")


def configured(**overrides: str) -> TrainingConfig:
    """The paper's recipe with settings replaced, `video__frames="17"` for nested ones."""
    return load_config(RECIPE, {name.replace("__", "."): value for name, value in overrides.items()})


@pytest.fixture(scope="module")
def full() -> Plan:
    return plan(configured())


@pytest.fixture(scope="module")
def small() -> Plan:
    return plan(configured(**SMALL))


def dry_run(config: TrainingConfig, stage: str) -> None:
    """Every shape of a stage through one step's forward and loss."""
    settings = config.stage(stage)
    step = DryStep(build_models(config, settings.loop.dtype), config, settings)
    with step.kernels, torch.no_grad():
        step.loss(1)


def chosen(memories: tuple[Memory, ...], **wanted: object) -> Memory:
    (memory,) = [m for m in memories if all(getattr(m, name) == value for name, value in wanted.items())]
    return memory


def test_parameters_of_the_5b_model(full: Plan) -> None:
    """By part; all parts together are the whole adapter, as docs/checkpoint.md adds it up."""
    assert sum(full.trainable.values()) == 1_773_973_120
    assert full.trainable["cross-attention"] == 21 * (2 * 3072**2 + 2 * 64)
    assert full.trainable["CAN"] == 21 * ((512 + 512 + 3072 + 1) * 1024 + (1024 + 1) * 12 * 3072)
    assert full.frozen["DiT"] == pytest.approx(5.57e9, rel=0.001)
    assert full.frozen["T5"] == pytest.approx(4.76e9, rel=0.001)


def test_arithmetic_of_the_5b_model(full: Plan) -> None:
    """Forward as counted for sampling, 332.82 TFLOP. Backward: each linear layer once more, for no frozen weight has a
    gradient, and attention two and a half times."""
    video = full.stages["video"]
    assert video.video_tokens == 17_550
    assert video.forward_flops == pytest.approx(332.82e12, rel=0.001)
    plain, adapted = 226 + 17_550, 226 + 32 + 17_550
    attention = 21 * 4 * 3072 * (plain**2 + adapted**2)
    assert video.backward_flops == pytest.approx(video.forward_flops + 1.5 * attention, rel=0.001)
    assert video.recomputed_flops == pytest.approx(video.forward_flops, rel=0.001)
    sample = video.forward_flops + video.backward_flops + video.recomputed_flops
    step = 8 * (sample + video.identity_share * video.identity_flops)
    assert video.step_flops == step
    assert video.gpu_hours["A100"] == pytest.approx(step * 5000 / 312e12 / 0.4 / 3600)


def test_autocast_is_accelerates() -> None:
    """Layers compute in bf16 from one copy of each trained weight, norms in float32, as CUDA's autocast has them."""
    with torch.device("meta"):
        linear, frozen, norm = nn.Linear(8, 8), nn.Linear(8, 8).requires_grad_(False), nn.LayerNorm(8)
        x = torch.empty(2, 8)
    with GpuKernels(torch.bfloat16) as kernels:
        assert linear(x).dtype == frozen(linear(x)).dtype == torch.bfloat16
        assert norm(linear(x)).dtype == torch.float32
    assert {key: copy.numel() for key, copy in kernels.copies.items()} == {id(linear.weight): 64, id(linear.bias): 8}
    with GpuKernels():
        assert norm(linear(x)).dtype == torch.float32


@pytest.mark.parametrize(
    ("stage", "checkpointing", "fp8_base"),
    [("image", True, False), ("video", True, False), ("video", False, False), ("video", True, True)],
)
def test_the_peak_is_that_of_a_device(
    stage: str, checkpointing: bool, fp8_base: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps of two micro-batches, every sample judged, hold what was planned at once, within 10%, and their
    checkpoint takes what was planned on the disk.

    The face recogniser, which the planner leaves out, is a view here.
    """
    stand_ins.install(monkeypatch.setattr)
    with simulated() as accelerator:
        switches = {"gradient_checkpointing": str(checkpointing).lower(), "fp8_base": str(fp8_base).lower()}
        config = configured(**SMALL, validation_people="0", **switches)
        settings = config.stage(stage)
        batch = {"batch_size": 2 * settings.loop.micro_batch, "warmup_steps": 0, "workers": 0, "validate_every": 0}
        loop = dataclasses.replace(settings.loop, steps=2, save_every=2, log_every=2, **batch)
        features = tmp_path / "features"
        settings = dataclasses.replace(
            settings, loop=loop, identity_start=0, identity_timesteps=(0, 1000), features=str(features)
        )
        config = dataclasses.replace(config, **{stage: settings})
        write_features(config, stage, features)
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState().device = accelerator.device
        checkpoint = train(RehearsedTask(config, stage), loop, tmp_path / "run")
        AcceleratorState._reset_state(reset_partial_state=True)
    stage_plan = plan(config).stages[stage]
    written = sum(path.stat().st_size for path in checkpoint.iterdir())
    assert stage_plan.checkpoint_bytes == pytest.approx(written, rel=0.01)
    planned = chosen(stage_plan.memory, checkpointing=checkpointing)
    assert planned.total == pytest.approx(accelerator.peak_bytes, rel=0.1)


def test_memory_adds_up(full: Plan) -> None:
    """Each part by hand; with a micro-batch of its own, every GPU needs the same."""
    memories, trained = full.stages["video"].memory, sum(full.trainable.values())
    for memory in memories:
        assert memory.total == sum(memory.parts.values())
        assert memory.fits == {f"{card} GB": memory.total <= 0.9 * card * 2**30 for card in (24, 40, 80)}
    alone = chosen(memories, gpus=1, checkpointing=True).parts
    states = {name: alone[name] // trained for name in ("trained weights", "gradients", "Adam", "EMA")}
    assert states == {"trained weights": 4, "gradients": 4, "Adam": 8, "EMA": 4}
    assert alone["frozen weights"] == pytest.approx(2 * (full.frozen["DiT"] + full.frozen["VAE"]), rel=0.001)
    assert [memory.gpus for memory in memories] == [1, 1]
    spread = plan(configured(**SMALL, video__loop__micro_batch="null")).stages["video"].memory
    assert [(memory.gpus, memory.micro_batch) for memory in spread] == [(1, 8), (1, 8), (8, 1), (8, 1)]


def test_quantised_parts_take_what_is_planned(small: Plan) -> None:
    """8-bit Adam's moments are those that bitsandbytes makes; of an fp8 base the norms and the VAE stay as they are."""
    loop = dict(video__loop__use_8bit_adam="true")
    memory = plan(configured(**SMALL, **loop, fp8_base="true")).stages["video"].memory
    planned = memory[0].parts
    adapter = MagicMirrorAdapter(tiny.ADAPTER)
    optimizer = adamw(adapter, configured(**SMALL, **loop).video.loop)
    for parameter in adapter.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moments = [t for state in optimizer.state.values() for name, t in state.items() if name in _MOMENTS]
    assert planned["Adam"] == sum(t.nbytes for t in moments)
    assert planned["frozen weights"] < 0.8 * small.stages["video"].memory[0].parts["frozen weights"]
    # What was widened is stored again behind each layer: nothing of it stays where blocks run again.
    kept = [chosen(of, checkpointing=True).parts["forward pass"] for of in (memory, small.stages["video"].memory)]
    assert kept[0] == pytest.approx(kept[1], rel=0.01)


_MOMENTS = ("state1", "state2", "absmax1", "absmax2")


@pytest.mark.parametrize(("recipe", "card"), [("cogvideox_5b", "80 GB"), ("cogvideox_2b_24gb", "24 GB")])
def test_recipes_fit_the_cards_that_they_are_for(recipe: str, card: str, full: Plan) -> None:
    planned = full if recipe == RECIPE.stem else plan(load_config(RECIPE.with_stem(recipe)))
    for stage in planned.stages.values():
        assert chosen(stage.memory, gpus=1, checkpointing=True).fits[card]


def test_numbers_grow_with_the_clip(small: Plan) -> None:
    larger = plan(configured(**SMALL | dict(width="96"))).stages["video"]
    lower = plan(configured(**SMALL | dict(height="32"))).stages["video"]
    video = small.stages["video"]
    for name in ("video_tokens", "forward_flops", "backward_flops", "step_flops"):
        assert getattr(lower, name) < getattr(video, name) < getattr(larger, name)
    for few, some, many in zip(lower.memory, video.memory, larger.memory):
        assert few.parts["forward pass"] < some.parts["forward pass"] < many.parts["forward pass"]
        assert few.parts["Adam"] == some.parts["Adam"] == many.parts["Adam"]


def test_the_identity_loss_is_counted_where_it_acts(small: Plan) -> None:
    image, video = small.stages["image"], small.stages["video"]
    assert video.identity_share == 0.5
    assert image.identity_share == pytest.approx(0.5 * 28 / 30)  # it starts after 2,000 of 30,000 steps
    off = plan(configured(**SMALL, video__identity_weight="0")).stages["video"]
    assert off.identity_flops == 0
    assert all(memory.parts["identity loss"] == 0 for memory in off.memory)
    assert off.memory[0].parts["frozen weights"] < video.memory[0].parts["frozen weights"]  # no VAE


def test_sampled_clips_are_counted(small: Plan) -> None:
    """Two passes, one of them the base's alone, and a way back, beside what a noised sample costs."""
    without = small.stages["video"]
    sampled = plan(configured(**SMALL, video__sampling="{clips: 8}")).stages["video"]
    more = without.batch_size * (2 * without.forward_flops + without.backward_flops + without.recomputed_flops)
    assert sampled.step_flops == pytest.approx(without.step_flops + more, rel=0.02)
    assert sampled.memory[0].parts["forward pass"] > 1.5 * without.memory[0].parts["forward pass"]


def test_reports(small: Plan) -> None:
    """Every part has its name in the text."""
    text = str(small)
    for name in (*small.trainable, *small.frozen, *small.stages["video"].memory[0].parts, "RTX 4090", "assumption"):
        assert name in text


@pytest.mark.parametrize("base", ["THUDM/CogVideoX-5b", "CogVideoX-2b", "CogVideoX1.5-5B"])
@pytest.mark.parametrize("stage", ["image", "video"])
def test_full_size_steps_fit(base: str, stage: str) -> None:
    dry_run(configured(base=base), stage)


def test_a_folder_is_planned_like_the_model_in_it(small: Plan, tmp_path: Path) -> None:
    """With PhotoMaker-V2 as its ID encoder, as every folder."""
    pipe = untrained_tiny.build_base(torch.float32)
    pipe.transformer.save_config(tmp_path / "transformer")
    pipe.vae.save_config(tmp_path / "vae")
    pipe.text_encoder.config.save_pretrained(tmp_path / "text_encoder")
    planned = plan(configured(**SMALL | dict(base=str(tmp_path))))
    assert planned.base == tmp_path.name
    assert {name: planned.frozen[name] for name in ("DiT", "VAE", "T5")} == {
        name: small.frozen[name] for name in ("DiT", "VAE", "T5")
    }


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (dict(video__frames="57"), "57 frames"),
        (dict(base="CogVideoX1.5-5B", video__frames="41"), r"16 x N \+ 1"),
        (dict(adapter="{hidden_size: 3000}"), "hidden_size"),
        (dict(adapter="{clip_hidden_size: 768}"), "does not fit THUDM/CogVideoX-5b"),
        (dict(adapter="{id_token_dim: 1024}"), "does not fit"),
        (dict(adapter="{width: 3}"), "width"),
        (dict(base="CogVideoX-7b"), "CogVideoX-7b; it must be tiny, one of CogVideoX-5b"),
    ],
)
def test_sizes_that_do_not_fit_are_told(overrides: dict[str, str], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        dry_run(configured(**overrides), "video")
