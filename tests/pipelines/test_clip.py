"""What a base model's own values stand for, and which sizes are far from them."""

from __future__ import annotations

import pytest

from mm_core.checkpoints.adapter_file import read_header
from mm_core.errors import SettingError
from mm_core.pipelines.base import TinyBase
from mm_core.pipelines.checks import Checks
from mm_core.pipelines.clip import ClipSettings
from mm_core.pipelines.control import AdapterSettings
from mm_core.pipelines.presets import PRESETS, ClipLimits, Sampling

TINY = TinyBase()
OF_5B = ClipLimits.from_config(PRESETS["CogVideoX-5b"].transformer, PRESETS["CogVideoX-5b"].vae)


def test_zero_is_what_the_model_does_best() -> None:
    assert ClipSettings.of_model(TINY.limits, TINY.sampling, prompt="a man") == ClipSettings(
        prompt="a man", width=64, height=64, num_frames=9, steps=12, guidance_scale=3.0, dynamic_guidance=False,
        scheduler="ddim",
    )  # fmt: skip
    assert ClipSettings.of_model(OF_5B, Sampling(), prompt="a man") == ClipSettings(
        prompt="a man", width=720, height=480, num_frames=49, steps=50, guidance_scale=6.0, dynamic_guidance=True,
        scheduler="dpm",
    )  # fmt: skip


def test_what_is_asked_for_stays() -> None:
    asked = dict(
        width=96, height=48, num_frames=1, steps=7, guidance_scale=1.0, dynamic_guidance=False, scheduler="dpm"
    )
    clip = ClipSettings.of_model(TINY.limits, TINY.sampling, prompt="a man", seed=5, **asked)
    assert {name: getattr(clip, name) for name in asked} == asked and clip.seed == 5


def test_a_draft_is_a_third_of_the_work() -> None:
    """Where nothing else is asked for; a model that takes fewer steps itself takes no more for a draft."""
    for limits, sampling, summary in (
        (OF_5B, Sampling(), "16 dpm steps, guidance 6, seed 0"),
        (TINY.limits, TINY.sampling, "12 ddim steps, guidance 3, seed 0"),
    ):
        clip = ClipSettings.of_model(limits, sampling, prompt="a man", scheduler="draft")
        assert clip.summary.endswith(summary)
    assert ClipSettings.of_model(OF_5B, Sampling(), prompt="a man", scheduler="draft", steps=20).steps == 20


@pytest.mark.parametrize(("width", "height", "warned"), [(64, 64, 0), (96, 64, 0), (128, 128, 1), (16, 16, 1)])
def test_sizes_that_were_not_trained(width: int, height: int, warned: int) -> None:
    TINY.limits.check(width=width, height=height, num_frames=9)
    assert len(TINY.limits.cautions(width=width, height=height)) == warned


def test_what_is_not_read_of_the_prompts() -> None:
    """The end of one that is too long, and letters; without guidance there is no negative prompt."""
    checks, long = Checks(TINY, read_header(TINY.adapter)), "a man img smiles" + " and smiles" * 30
    told = ["The prompt: CUT OFF, 17 tokens: smiles and smiles", "The negative prompt: The model cannot read: é"]
    for guidance in (3.0, 1.0):
        clip = ClipSettings(
            prompt=long, negative_prompt="é a é", guidance_scale=guidance, width=64, height=64, num_frames=9
        )
        cautions = checks.cautions(clip, checks.of_prompt(clip, AdapterSettings()))
        assert [line[:49] for line in cautions] == (told if guidance > 1 else told[:1])


def test_sizes_far_beyond_are_refused() -> None:
    with pytest.raises(SettingError, match=r"720 x 480 px is far beyond .* 64 x 64"):
        TINY.limits.check(width=720, height=480, num_frames=9)
    OF_5B.check(width=1360, height=768, num_frames=49)
