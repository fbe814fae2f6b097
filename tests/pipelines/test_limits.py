"""Wrong sizes, lengths and numbers are told, with the limit and a way out, before anything heavy is loaded."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_models import build_identity

from mm_core.errors import CheckpointError, MagicMirrorError, PromptError, SettingError
from mm_core.pipelines.base import FolderBase
from mm_core.pipelines.clip import ClipSettings
from mm_core.pipelines.control import AdapterSettings
from mm_core.pipelines.magic_mirror import MagicMirror
from mm_core.pipelines.presets import PRESETS, ClipLimits

NAN, INFINITY = float("nan"), float("inf")


def limits(name: str) -> ClipLimits:
    return ClipLimits.from_config(PRESETS[name].transformer, PRESETS[name].vae)


@pytest.mark.parametrize(
    ("model", "size", "named"),
    [
        ("CogVideoX-5b", {"width": 481}, ["width", "481", "16", "480"]),
        ("CogVideoX-5b", {"height": 488}, ["height", "488", "16"]),
        ("CogVideoX-5b", {"width": 0}, ["width", "0 px", "16"]),
        ("CogVideoX-5b", {"height": -16}, ["height", "-16", "16"]),
        ("CogVideoX-5b", {"num_frames": 48}, ["48 frames", "8 x N + 1", "41", "49"]),
        ("CogVideoX-5b", {"num_frames": 13}, ["13 frames", "8 x N + 1", "9", "17"]),
        ("CogVideoX-5b", {"num_frames": 0}, ["0 frames", "1 (an image)", "49"]),
        ("CogVideoX-5b", {"num_frames": -7}, ["-7 frames", "49"]),
        ("CogVideoX-5b", {"num_frames": 57}, ["57 frames", "49"]),
        ("CogVideoX-2b", {"num_frames": 50}, ["50 frames", "49"]),
        ("CogVideoX1.5-5B", {"num_frames": 9}, ["9 frames", "16 x N + 1", "1 ", "17"]),
        ("CogVideoX1.5-5B", {"num_frames": 80}, ["80 frames", "16 x N + 1", "65", "81"]),
        ("CogVideoX1.5-5B", {"num_frames": 177}, ["177 frames", "161"]),
        ("CogVideoX1.5-5B", {"width": 2416}, ["width", "2416", "2400"]),
    ],
)
def test_impossible_clips(model: str, size: dict[str, int], named: list[str]) -> None:
    """Every length and size that the model cannot make is refused: value, limit, and the nearest that works."""
    with pytest.raises(SettingError) as error:
        limits(model).check(**dict(width=720, height=480, num_frames=1) | size)
    assert [text for text in named if text not in str(error.value)] == []


@pytest.mark.parametrize("model", PRESETS)
def test_suggestions_work(model: str) -> None:
    """Of all lengths those that the message suggests are possible ones, and the nearest."""
    limit = limits(model)
    possible = [n for n in range(1, limit.max_frames + 1) if n % limit.frame_step == 1]
    for frames in range(1, limit.max_frames + 1):
        if frames in possible:
            limit.check(width=720, height=480, num_frames=frames)
            continue
        below, above = (max(n for n in possible if n < frames), min(n for n in possible if n > frames))
        with pytest.raises(SettingError, match=f"Try {below} or {above}\\."):
            limit.check(width=720, height=480, num_frames=frames)


@pytest.mark.parametrize(
    ("model", "width", "height", "frames"),
    [("CogVideoX-5b", 720, 480, 49), ("CogVideoX-2b", 720, 480, 49), ("CogVideoX1.5-5B", 1360, 768, 161)],
)
def test_published_clips_are_possible(model: str, width: int, height: int, frames: int) -> None:
    """The sizes that the models were made for pass, and are the defaults."""
    limits(model).check(width=width, height=height, num_frames=frames)
    assert (limits(model).width, limits(model).height) == (width, height)


@pytest.mark.parametrize("name", ["identity_scale", "can_scale", "ip_scale"])
@pytest.mark.parametrize("value", [NAN, -0.1, INFINITY, 3.01])
def test_strengths(name: str, value: float) -> None:
    """A strength is a number from 0 to 3."""
    with pytest.raises(SettingError, match=f"{name} is {value}; it must be a number from 0 to 3"):
        AdapterSettings(**{name: value})


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"start": -0.1}, ["start", "-0.1", "0", "1"]),
        ({"end": 1.5}, ["end", "1.5"]),
        ({"start": NAN}, ["start", "nan"]),
        ({"start": 0.7, "end": 0.2}, ["0.7", "0.2", "swap"]),
    ],
)
def test_window(settings: dict[str, float], named: list[str]) -> None:
    """The identity acts from a part of the schedule to a later one."""
    with pytest.raises(SettingError) as error:
        AdapterSettings(**settings)
    assert [text for text in named if text not in str(error.value)] == []


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"steps": 0}, ["steps", "0", "1 to 1000"]),
        ({"steps": 1001}, ["1001", "1000"]),
        ({"guidance_scale": 0.5}, ["guidance_scale", "0.5", "1 (off)", "30"]),
        ({"guidance_scale": NAN}, ["nan", "30"]),
        ({"guidance_scale": INFINITY}, ["inf", "30"]),
        ({"scheduler": "euler"}, ["'euler'", "ddim", "dpm"]),
    ],
)
def test_sampling(settings: dict[str, Any], named: list[str]) -> None:
    """Steps, guidance and scheduler are checked when they are set."""
    with pytest.raises(SettingError) as error:
        ClipSettings(prompt="a man", width=32, height=32, num_frames=1, **settings)
    assert [text for text in named if text not in str(error.value)] == []


@pytest.fixture
def weightless(folders: dict[str, Path], tmp_path: Path) -> MagicMirror:
    """A base model and an adapter of which only configs, tokenizer and header are there: no weight can be read."""
    folder = tmp_path / "base"
    shutil.copytree(folders["5b"], folder, ignore=shutil.ignore_patterns("diffusion_pytorch*", "model.safetensors"))
    adapter = folder / "adapter.safetensors"
    mirror = MagicMirror(FolderBase(folder), adapter=adapter)
    adapter.unlink()
    return mirror


@pytest.mark.parametrize(
    ("clip", "error"),
    [
        ({"width": 481}, SettingError),
        ({"num_frames": 10}, SettingError),
        ({"prompt": "a wizard reading"}, PromptError),
        ({"prompt": "a " * 40 + "man"}, PromptError),
    ],
)
def test_mistakes_are_told_before_loading(
    weightless: MagicMirror, clip: dict[str, Any], error: type[MagicMirrorError]
) -> None:
    """Sampling tells the mistake although the weights, read first, would be an error of their own."""
    right = dict(prompt="a man reading", width=32, height=32, num_frames=1, steps=1)
    with pytest.raises(error):
        weightless.sample(ClipSettings(**right | clip), build_identity())
    weightless.check(ClipSettings(**right), build_identity(), AdapterSettings())
    with pytest.raises(CheckpointError):
        weightless.sample(ClipSettings(**right), build_identity())


def test_identity_of_another_encoder(mirror: MagicMirror) -> None:
    """An identity with tokens of other sizes is refused, naming both."""
    clip = ClipSettings(prompt="a man", width=32, height=32, num_frames=1)
    identity = build_identity()
    features = identity.features._replace(id_tokens=identity.features.id_tokens.repeat(1, 2, 1))
    with pytest.raises(CheckpointError, match=r"\(4, 12, 6\).*\(2, 12, 6\)"):
        mirror.check(clip, type(identity)(features=features, references=()), AdapterSettings())


def test_identity_without_adapter(folders: dict[str, Path]) -> None:
    """A base model alone cannot show anybody."""
    clip = ClipSettings(prompt="a man", width=32, height=32, num_frames=1)
    with pytest.raises(CheckpointError, match="without an adapter"):
        MagicMirror(FolderBase(folders["5b"])).check(clip, build_identity(), AdapterSettings())
