"""Steps that reuse the one before: fewer blocks run, the clip stays near, and no other clip sees anything of it.

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
from mm_core.pipelines.control import AdapterSettings
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
    """The first block, with the identity in it, runs in every step; the others in few."""
    latents, ran = {}, {}
    for kind in STEP_CACHES:
        calls.clear()
        latents[kind] = sample(mirror, kind, scheduler=scheduler)
        ran[kind] = calls.count(1)
        assert calls.count(0) == 2 * CLIP.steps and calls.count(7) == ran[kind]
    assert ran["off"] == CLIP.steps > ran["balanced"] > ran["fast"] > 1
    off = latents["off"]
    errors = [float((latents[kind] - off).norm() / off.norm()) for kind in STEP_CACHES]
    assert errors[0] == 0 < errors[1] < errors[2] < 0.6


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


@pytest.mark.parametrize(("step_cache", "person"), [("off", "woman"), ("off", None), ("fast", "woman")])
def test_after_the_end_of_guidance_a_step_is_half(mirror: MagicMirror, step_cache: str, person: str | None) -> None:
    """One row of the batch then, which is the prompt's: from the start on, the clip is that without guidance. At the
    end of the schedule it is the guided clip, bit for bit."""
    rows: list[int] = []
    layer = mirror.pipeline.transformer.transformer_blocks[0].ff
    hook = layer.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    clips, counts = [], []
    for scale, end in ((3.0, 1.0), (3.0, 0.5), (3.0, 0.0), (1.0, 1.0)):
        rows.clear()
        clip = replace(CLIP, steps=8, step_cache=step_cache, guidance_scale=scale, guidance_end=end)
        clips.append(mirror.sample(clip, person and example_identity(person)))
        counts.append(sum(rows))
    hook.remove()
    assert counts == [16, 12, 8, 8]
    assert torch.equal(clips[2], clips[3]) and not torch.equal(clips[1], clips[0])
    assert "forward" not in vars(mirror.pipeline.transformer)


def test_the_identity_in_both_halves(mirror: MagicMirror) -> None:
    """Where one half is left, it is the one that carries it."""
    clip, identity = replace(CLIP, steps=2, guidance_end=0.0), example_identity("woman")
    both = mirror.sample(clip, identity, AdapterSettings(in_negative=True))
    assert torch.equal(both, mirror.sample(clip, identity))


def test_it_is_said_and_checked() -> None:
    assert "guidance 3 to 0.5 of the steps" in replace(CLIP, guidance_end=0.5).summary
    with pytest.raises(SettingError, match="guidance_end is 2"):
        replace(CLIP, guidance_end=2.0)
    assert "24 ddim steps, step cache fast, guidance 3" in replace(CLIP, step_cache="fast").summary
    assert "cache" not in CLIP.summary
    with pytest.raises(SettingError, match="step_cache is 'slow'; choose one of off, balanced, fast"):
        replace(CLIP, step_cache="slow")
