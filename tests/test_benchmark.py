"""The benchmark's page is what the command writes, and its numbers are what runs."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerator import Accelerator
from tiny_models import TRANSFORMERS, VAE

from mm_core.benchmark import measure
from mm_core.benchmark.__main__ import main, write
from mm_core.benchmark.measure import full_size, phases
from mm_core.benchmark.page import to_markdown
from mm_core.pipelines.base import TinyBase
from mm_core.pipelines.clip import ClipSettings
from mm_core.pipelines.magic_mirror import MagicMirror
from mm_core.pipelines.presets import PRESETS

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def found() -> dict:
    return json.loads((DOCS / "benchmark.json").read_text())


def test_nothing_of_the_page_is_typed_by_hand(found: dict, tmp_path: Path) -> None:
    assert to_markdown(found, "benchmark.png") == (DOCS / "benchmark.md").read_text()
    write(found, tmp_path / "page.md")
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "page.json").read_text()) == found


def test_without_matplotlib_there_is_no_picture(
    found: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    write(found, tmp_path / "page.md")
    assert "-m pip install matplotlib" in capsys.readouterr().err
    assert "![" not in (tmp_path / "page.md").read_text() and not (tmp_path / "page.png").exists()


def test_a_model_with_random_weights_on_a_device(accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds and peaks, plain and adapted; the difference is what the adapter has on the device."""
    for name, value in dict(FRAMES=9, HEIGHT=64, WIDTH=64).items():
        monkeypatch.setattr(measure, name, value)
    preset = replace(PRESETS["CogVideoX-5b"], transformer=TRANSFORMERS["5b"], vae=VAE)
    results = full_size(preset, rounds=2, device=accelerator.device)
    plain, adapted = results["plain"], results["adapted"]
    assert 0 < plain["peak"] < adapted["peak"]
    assert adapted["clip"] == pytest.approx(50 * adapted["step"] + results["decoding"]["seconds"])


def test_phases_of_a_clip() -> None:
    mirror = MagicMirror(TinyBase(), device=torch.device("cpu"))
    clip = ClipSettings.of_model(mirror.base.limits, mirror.base.sampling, prompt="A person img.", steps=2)
    seconds = phases(mirror, clip, rounds=1)
    assert seconds.keys() == {"plain", "adapted"}
    assert all(took.keys() == {"text", "identity", "steps", "decoding"} for took in seconds.values())
    assert all(took["steps"] > 0 for took in seconds.values())


def test_a_folder_that_is_no_model(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["--output", str(tmp_path / "page.md"), "--base", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
