"""Strength, start and end of each part of the identity, and the presets of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from tiny_models import build_identity
from torch import Tensor, nn

from mm_core.errors import PromptError, SettingError
from mm_core.hosts.cogvideox_diffusers import STATE
from mm_core.models.adapter import MagicMirrorAdapter
from mm_core.models.block import FaceState
from mm_core.pipelines.clip import ClipSettings
from mm_core.pipelines.control import BALANCED, CONTROLS, AdapterSettings, Window
from mm_core.pipelines.magic_mirror import MagicMirror

NEVER = Window(0.0, 0.0)
MOTION = CONTROLS["motion first"]


def clip(**changes: Any) -> ClipSettings:
    """A small clip of a few steps."""
    return ClipSettings(
        **dict(prompt="a man img reading", width=48, height=32, num_frames=9, steps=4, seed=7) | changes
    )


class Step(NamedTuple):
    """What the transformer got at one step."""

    text: Tensor
    state: FaceState | None

    def can_scale(self, full: Step) -> float:
        """How strong CAN is, beside the same step at strength 1."""
        ours, whole = (0.0 if step.state is None else float(step.state.factors.can.norm()) for step in (self, full))
        return round(ours / whole, 4)

    @property
    def face(self) -> bool:
        return self.state is not None and self.state.streams.shape[2] > 0


@pytest.fixture
def steps(mirror: MagicMirror) -> Iterator[list[Step]]:
    """Each forward of the transformer, as it happens."""
    seen: list[Step] = []

    def note(_: nn.Module, __: tuple[()], kwargs: dict[str, Any]) -> None:
        seen.append(Step(kwargs["encoder_hidden_states"][-1].clone(), (kwargs["attention_kwargs"] or {}).get(STATE)))

    handle = mirror.pipeline.transformer.register_forward_pre_hook(note, with_kwargs=True)
    yield seen
    handle.remove()


@pytest.mark.parametrize(
    ("settings", "fused", "can", "face"),
    [
        (
            AdapterSettings(
                can_scale=0.8,
                identity_window=Window(0.25, 1.0),
                can_window=Window(0.0, 0.5),
                ip_window=Window(0.5, 0.75),
            ),
            [False, True, True, True],
            [0.8, 0.8, 0.0, 0.0],
            [False, False, True, False],
        ),
        # A part without a window of its own has that of all.
        (
            AdapterSettings(start=0.25, end=0.75, ip_window=Window(0.5, 1.0)),
            [False, True, True, False],
            [0.0, 1.0, 1.0, 0.0],
            [False, False, True, True],
        ),
    ],
)
def test_each_part_acts_in_its_window(
    mirror: MagicMirror,
    steps: list[Step],
    settings: AdapterSettings,
    fused: list[bool],
    can: list[float],
    face: list[bool],
) -> None:
    mirror.sample(clip(), build_identity())
    mirror.sample(clip())
    (with_person, *_), (plain, *_) = steps[:4], steps[4:8]
    mirror.sample(clip(), build_identity(), settings)
    ours = steps[8:]
    assert not torch.equal(with_person.text, plain.text)
    for step, is_fused in zip(ours, fused, strict=True):
        assert torch.equal(step.text, with_person.text if is_fused else plain.text)
    assert [step.can_scale(whole) for step, whole in zip(ours, steps[:4], strict=True)] == can
    assert [step.face for step in ours] == face


def test_one_window_for_all_is_three_alike(mirror: MagicMirror) -> None:
    window = Window(0.25, 0.75)
    together = AdapterSettings(start=window.start, end=window.end)
    apart = AdapterSettings(identity_window=window, can_window=window, ip_window=window)
    one, two = (mirror.sample(clip(), build_identity(), settings) for settings in (together, apart))
    assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("never", "ablated"),
    [
        (AdapterSettings(can_window=NEVER), AdapterSettings(can=False)),
        (AdapterSettings(ip_window=NEVER), AdapterSettings(structure_branch=False)),
    ],
)
def test_a_part_that_never_acts_is_the_ablation_of_it(
    mirror: MagicMirror, never: AdapterSettings, ablated: AdapterSettings
) -> None:
    one, two = (mirror.sample(clip(), build_identity(), settings) for settings in (never, ablated))
    assert torch.equal(one, two)
    assert not torch.allclose(one, mirror.sample(clip(), build_identity()), atol=1e-2)


def test_text_fusion_that_never_acts(mirror: MagicMirror, steps: list[Step]) -> None:
    """The plain prompt is read, which then need not name a person."""
    mirror.sample(clip())
    never = AdapterSettings(identity_window=NEVER)
    mirror.sample(clip(), build_identity(), never)
    assert all(torch.equal(step.text, steps[0].text) for step in steps)
    assert steps[-1].state.factors.can.any() and steps[-1].face
    wizard = clip(prompt="a wizard reading")
    assert mirror.check(wizard, build_identity(), never) is None
    with pytest.raises(PromptError):
        mirror.check(wizard, build_identity(), AdapterSettings())


def last_layers(adapter: MagicMirrorAdapter, part: str) -> list[nn.Module]:
    """Those without whose weights a part of the method adds nothing."""
    if part == "identity_scale":
        return [adapter.id_fusion.mlp1.fc2, adapter.id_fusion.mlp2.fc2]
    return [block.can.linear_2 if part == "can_scale" else block.attn.to_v_ip for block in adapter.blocks.values()]


@pytest.mark.parametrize("part", ["identity_scale", "can_scale", "ip_scale"])
def test_strength_0_is_an_adapter_without_the_part(mirror: MagicMirror, part: str) -> None:
    whole = mirror.sample(clip(), build_identity())
    off = mirror.sample(clip(), build_identity(), AdapterSettings(**{part: 0.0}))
    kept = [(p, p.clone()) for layer in last_layers(mirror.adapter, part) for p in layer.parameters()]
    try:
        with torch.no_grad():
            for parameter, _ in kept:
                parameter.zero_()
        without = mirror.sample(clip(), build_identity())
    finally:
        with torch.no_grad():
            for parameter, weights in kept:
                parameter.copy_(weights)
    assert torch.equal(off, without)
    assert not torch.equal(off, whole)
    assert torch.equal(mirror.sample(clip(), build_identity()), whole)


def test_presets_are_their_numbers() -> None:
    """Every part of each: strength, start, end."""
    numbers = {
        name: list(zip((s.identity_scale, s.can_scale, s.ip_scale), s.windows, strict=True))
        for name, s in CONTROLS.items()
    }
    assert numbers == {
        "likeness first": [(1.0, (0, 1)), (1.1, (0, 1)), (1.2, (0, 1))],
        "balanced": [(1.0, (0, 1)), (1.0, (0, 1)), (1.0, (0, 1))],
        "motion first": [(1.0, (0, 1)), (0.8, (0, 0.6)), (0.8, (0, 0.6))],
    }
    assert CONTROLS[BALANCED] == AdapterSettings()
    assert MOTION.summary() == "text fusion 1 from 0 to 1, CAN 0.8 from 0 to 0.6, cross-attention 0.8 from 0 to 0.6"


def test_motion_first_leaves_the_last_steps_to_the_base(mirror: MagicMirror, steps: list[Step]) -> None:
    """Its blocks run there, without a face stream to compute; the prompt stays the person's."""
    mirror.sample(clip(steps=5), build_identity(), MOTION)
    assert [step.state is not None for step in steps] == [True, True, True, False, False]
    assert all(torch.equal(step.text, steps[0].text) for step in steps)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"can_window": Window(-0.1, 1.0)}, "can_start is -0.1; it must be from 0"),
        ({"ip_window": Window(0.0, float("nan"))}, "ip_end is nan"),
        ({"identity_window": Window(0.7, 0.2)}, r"identity_start \(0.7\) is after end \(0.2\); swap them"),
    ],
)
def test_windows_that_are_none(settings: dict[str, Window], named: str) -> None:
    with pytest.raises(SettingError, match=named):
        AdapterSettings(**settings)
