"""Steps that reuse the one before: fewer blocks run, the clip stays near, and no other clip, of whatever person, sees
anything of it.

On the small model that ships: how far a step is from the next is a matter of trained weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache

import pytest
import torch
from accelerator import Accelerator
from PIL import Image
from torch import Tensor

from mm_core.choices import POLICIES, STEP_CACHES
from mm_core.errors import SettingError
from mm_core.examples import example_identity
from mm_core.pipelines.base import TinyBase
from mm_core.pipelines.clip import ClipSettings
from mm_core.pipelines.magic_mirror import MagicMirror

CPU = torch.device("cpu")
CLIP = ClipSettings(
    prompt="A person img smiles.", width=64, height=64, num_frames=9, steps=24, guidance_scale=3.0,
    dynamic_guidance=False, scheduler="ddim",
)  # fmt: skip


@pytest.fixture(scope="module")
def mirror() -> MagicMirror:
    return MagicMirror(TinyBase(), device=CPU)


@pytest.fixture
def calls(mirror: MagicMirror) -> Iterator[list[int]]:
    """The number of each block that computes; the adapted, even ones twice: rows without and with an identity."""
    ran: list[int] = []
    handles = [
        block.attn1.to_q.register_forward_pre_hook(lambda *_, number=number: ran.append(number))
        for number, block in enumerate(mirror.pipeline.transformer.transformer_blocks)
    ]
    yield ran
    for handle in handles:
        handle.remove()


def sample(mirror: MagicMirror, step_cache: str, person: str = "woman", **settings: object) -> Tensor:
    return mirror.sample(replace(CLIP, step_cache=step_cache, **settings), example_identity(person))


@pytest.mark.parametrize("scheduler", ["ddim", "dpm"])
def test_fewer_blocks_and_nearly_the_same_clip(mirror: MagicMirror, calls: list[int], scheduler: str) -> None:
    """The first block, with the identity in it, runs in every step; the others in few. Of `dpm`'s few steps here `fast`
    leaves out no more than `balanced`, but others."""
    latents, ran = {}, {}
    for kind in STEP_CACHES:
        calls.clear()
        latents[kind] = sample(mirror, kind, scheduler=scheduler)
        ran[kind] = calls.count(1)
        assert calls.count(0) == 2 * CLIP.steps and calls.count(7) == ran[kind]
    assert ran["off"] == CLIP.steps > ran["balanced"] >= ran["fast"] > 1
    off = latents["off"]
    errors = [float((latents[kind] - off).norm() / off.norm()) for kind in STEP_CACHES]
    assert errors[0] == 0 < min(errors[1:]) and max(errors) < 0.6
    assert scheduler == "dpm" or (ran["balanced"] > ran["fast"] and errors[1] < errors[2])


def test_nothing_is_left_for_the_next_clip(mirror: MagicMirror) -> None:
    """Another person, no cache, or a cancelled clip before: as in a model that has just been loaded."""
    man, off = sample(mirror, "fast", "man"), sample(mirror, "off", steps=2)

    class Cancelled(Exception):
        pass

    def cancel(done: int, steps: int, preview: Callable[[], Image.Image]) -> None:
        if done == 12:
            raise Cancelled

    with pytest.raises(Cancelled):
        mirror.sample(replace(CLIP, step_cache="fast"), example_identity("woman"), on_step=cancel)
    assert torch.equal(sample(mirror, "off", steps=2), off)
    assert torch.equal(sample(mirror, "fast", "man"), man)


@cache
def fast_clip(mirror: MagicMirror) -> Tensor:
    return sample(mirror, "fast")


@pytest.mark.parametrize("offload", POLICIES)
def test_offloaded(accelerator: Accelerator, mirror: MagicMirror, offload: str) -> None:
    """Blocks that are left out need not come to the device; the clip is that of the CPU."""
    there = MagicMirror(TinyBase(), device=accelerator.device, precision="fp32", offload=offload)
    assert torch.equal(sample(there, "fast"), fast_clip(mirror))


def test_it_is_said_and_checked() -> None:
    assert "24 ddim steps, step cache fast, guidance 3" in replace(CLIP, step_cache="fast").summary
    assert "cache" not in CLIP.summary
    with pytest.raises(SettingError, match="step_cache is 'slow'; choose one of off, balanced, fast"):
        replace(CLIP, step_cache="slow")
