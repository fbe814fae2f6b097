"""The one command that makes the small model, whole: every part at its real sizes, of a handful of clips and steps."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch

from lab.tiny import __main__ as small
from mm_core.checkpoints.adapter_file import load_adapter, read_header
from mm_core.pipelines.base import TinyBase
from mm_core.pipelines.preview import fit_latent_rgb
from mm_core.training.loop_config import LoopConfig

PEOPLE, STEPS, BATCH = 4, 2, 2


def shortened(loop: LoopConfig) -> LoopConfig:
    return dataclasses.replace(loop, steps=STEPS, batch_size=BATCH, warmup_steps=1, compile=False, validate_every=0)


@pytest.fixture
def command(tmp_path: Path, insightface_root: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(small, "PEOPLE", PEOPLE)
    monkeypatch.setattr(small, "CLIPS", 2)
    monkeypatch.setattr("lab.tiny.vae.CENTRING", 8)
    for name, value in vars(small).copy().items():
        if isinstance(value, LoopConfig):
            monkeypatch.setattr(small, name, shortened(value))
    sampling = dataclasses.replace(small.SAMPLED["sampling"], clips=2 * BATCH, steps=STEPS)
    sampled = small.SAMPLED | {"sampling": sampling, "loop": shortened(small.SAMPLED["loop"])}
    monkeypatch.setattr(small, "SAMPLED", sampled)
    stages = [
        f"{stage}.loop.{name}={value}"
        for stage in ("image", "video")
        for name, value in (("steps", STEPS), ("batch_size", BATCH), ("compile", "false"), ("validate_every", 0))
    ]
    settings = ["validation_people=1", "image.identity_start=1", *stages]
    return ["--folder", str(tmp_path / "run"), "--insightface-root", str(insightface_root), "--set", *settings]


def test_one_command_makes_the_small_model(command: list[str], tmp_path: Path) -> None:
    """Stopped in between, it goes on from one file, beside the people, and what it packs is a model that the nodes
    load."""
    carried = ["--state", str(tmp_path / "state.tar")]
    assert small.main([*command, *carried, "--until", "base"]) == 0
    (tmp_path / "run").rename(tmp_path / "before")
    shutil.copytree(tmp_path / "before" / "people", tmp_path / "run" / "people")
    assert small.main([*command, *carried]) == 0
    before, after = (weights(tmp_path / folder / "base") for folder in ("before", "run"))
    assert before == after and len(before) == 3
    packed = TinyBase(tmp_path / "run" / "packed")
    pipe = packed.load(torch.float32)
    assert pipe.transformer.config.num_layers == TinyBase().load(torch.float32).transformer.config.num_layers
    torch.testing.assert_close(packed.latent_rgb, fit_latent_rgb(pipe.vae, torch.device("cpu")), rtol=0, atol=1e-5)
    _, header = load_adapter(packed.adapter)
    assert header.config == read_header(TinyBase().adapter).config
    assert (header.trained.stage, header.trained.steps) == ("video", STEPS)


def test_pieces_make_what_one_run_makes(command: list[str], tmp_path: Path) -> None:
    """A step, and then all others in a folder where there is nothing but what the file brings."""
    command = [*command, "--people", "2", "--vae", str(TinyBase().folder / "vae"), "--until", "vae"]
    assert small.main(command) == 0
    (tmp_path / "run").rename(tmp_path / "unbroken")
    command += ["--state", str(tmp_path / "state.tar")]
    assert small.main([*command, "--minutes", "0"]) == 130
    (tmp_path / "run").rename(tmp_path / "piece")
    assert [path.name for path in (tmp_path / "piece" / "vae").rglob("step-*")] == ["step-00000001"]
    assert small.main(command) == 0
    unbroken, made = (weights(tmp_path / folder / "vae" / "decoder") for folder in ("unbroken", "run"))
    assert unbroken == made and len(made) == 1


def weights(folder: Path) -> dict[str, bytes]:
    """What other parts read."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*model.safetensors")}


def test_a_part_that_is_not_there_is_told_before_any_is_made(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert small.main([*command, "--until", "bases"]) == 2
    assert "--until bases" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_last_stages_settings_fit_each_other(tmp_path: Path) -> None:
    recipe = small.Recipe(tmp_path, tmp_path, {})
    assert dataclasses.replace(recipe.config.video, **small.SAMPLED).sampling.clips
    parts = list(recipe.parts)
    assert parts[parts.index("video") :] == ["video", "judge", "sampled", "pack"]


def test_a_larger_model(tmp_path: Path) -> None:
    """Sizes and the machine's settings reach every part."""
    larger = {"width": "128", "height": "128", "video.frames": "17"}
    recipe = small.Recipe(tmp_path, tmp_path, larger, width=4, machine={"precision": "bf16", "workers": 4})
    assert recipe.config.video.loop.workers == 4 and recipe.config.image.loop.precision == "bf16"
    assert recipe.sizes.transformer["num_attention_heads"] == 24 and recipe.sizes.vae["block_out_channels"][0] == 64
    assert (recipe.sizes.latent_frames, recipe.sizes.pixels) == (5, 128)
