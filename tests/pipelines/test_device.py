"""The whole product on an accelerator: right clips, no traffic in the loop, nothing left behind, little memory told.

A simulated accelerator always; frames are also compared on a CUDA device where there is one.
"""

from __future__ import annotations

import gc
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from accelerator import Accelerator
from diffusers import CogVideoXDPMScheduler
from packaging.version import Version
from tiny_models import PROMPT_TOKENS, build_identity, noise

from mm_core import memory
from mm_core.choices import POLICIES
from mm_core.errors import DecodeError, OutOfMemoryError
from mm_core.evaluation.factors import scale_factors
from mm_core.pipelines import decode
from mm_core.pipelines.base import FolderBase
from mm_core.pipelines.clip import Clip, ClipSettings
from mm_core.pipelines.magic_mirror import MagicMirror

STEPS = 4
CLIP = ClipSettings(
    prompt="A woman img smiles.", width=48, height=32, num_frames=9, steps=STEPS, guidance_scale=3.0, scheduler="dpm"
)
# What a step copies and reads, of which diffusers' own share is measured.
TRAFFIC = ("to device", "to host", "values read")
# How far a real device's kernels take a clip of this model of noise from the CPU's, relative to its size.
TOLERANCE = {"fp32": 1e-3, "bf16": 0.2, "fp16": 0.05, "fp8": 0.3}

Build = Callable[..., MagicMirror]


@pytest.fixture(scope="module")
def build(folders: dict[str, Path]) -> Build:
    """The product on the small 5B."""

    def make(device: torch.device, precision: str = "fp32", offload: str = "none") -> MagicMirror:
        base = FolderBase(folders["5b"])
        adapter = base.folder / "adapter.safetensors"
        return MagicMirror(base, adapter=adapter, precision=precision, offload=offload, device=device)

    return make


@pytest.fixture(scope="module")
def on_cpu(build: Build) -> Callable[[str, int], Clip]:
    """A person's clip, made on the CPU in a precision."""

    @cache
    def mirror(precision: str) -> MagicMirror:
        with pytest.MonkeyPatch.context() as patch:
            if precision == "fp8":  # a CPU would compute in fp32
                patch.setattr(memory, "compute_dtype", lambda *_: torch.bfloat16)
            return build(torch.device("cpu"), precision)

    @cache
    def clip(precision: str, person: int) -> Clip:
        return mirror(precision).generate(CLIP, build_identity(person))

    return clip


@pytest.fixture(params=["simulated", "cuda"])
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "simulated":
        return request.getfixturevalue("accelerator").device
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    return torch.device("cuda")


@pytest.mark.parametrize("offload", POLICIES)
@pytest.mark.parametrize("precision", TOLERANCE)
def test_the_clips_are_right(
    build: Build, on_cpu: Callable[[str, int], Clip], device: torch.device, precision: str, offload: str
) -> None:
    """Two clips of two people: on the simulated accelerator the CPU's, bit for bit."""
    mirror = build(device, precision, offload)
    for person in (0, 1):
        frames, expected = mirror.generate(CLIP, build_identity(person)).frames, on_cpu(precision, person).frames
        if device.type == "cuda":
            assert (frames - expected).norm() <= TOLERANCE[precision] * expected.norm()
        else:
            assert torch.equal(frames, expected)
    assert not torch.equal(on_cpu(precision, 0).frames, on_cpu(precision, 1).frames)


@pytest.mark.parametrize("offload", POLICIES)
def test_scale_factors_are_those_of_the_cpu(accelerator: Accelerator, build: Build, offload: str) -> None:
    found, expected = (
        scale_factors(build(device, offload=offload), build_identity(), STEPS).vectors
        for device in (accelerator.device, torch.device("cpu"))
    )
    assert np.array_equal(found, expected) and accelerator.traffic["to device"]


def per_step(accelerator: Accelerator, run: Callable[[Callable[..., Any]], Any]) -> list[Counter[str]]:
    """The traffic of each step but the first, from its end to the next one's. run: is given what to call after each."""
    seen: list[Counter[str]] = []
    run(lambda *_: seen.append(accelerator.traffic.copy()))
    return [Counter({name: after[name] - before[name] for name in TRAFFIC}) for before, after in pairwise(seen)]


def of_diffusers(accelerator: Accelerator, folder: Path, offload: str, clip: ClipSettings) -> list[Counter[str]]:
    """The same of diffusers' pipeline alone."""
    pipe = FolderBase(folder).load(torch.float32, text_encoder=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = CogVideoXDPMScheduler.from_config(pipe.scheduler.config)
    part = memory.Offloading(offload, accelerator.device).part("transformer", [pipe.transformer])
    pipe.execution_device = accelerator.device
    embeds = noise(1, PROMPT_TOKENS, pipe.transformer.config.text_embed_dim).to(accelerator.device)

    def run(after: Callable[..., Any]) -> None:
        pipe(
            prompt_embeds=embeds, negative_prompt_embeds=embeds, width=clip.width, height=clip.height,
            num_frames=clip.num_frames, num_inference_steps=clip.steps, guidance_scale=clip.guidance_scale,
            use_dynamic_cfg=True, output_type="latent", callback_on_step_end=lambda *_: after() or {},
            generator=torch.Generator("cpu").manual_seed(clip.seed),
        )  # fmt: skip

    with part.ready():
        return per_step(accelerator, run)


@pytest.mark.parametrize("offload", POLICIES)
def test_steps_copy_and_read_as_little_as_diffusers(
    accelerator: Accelerator, build: Build, folders: dict[str, Path], offload: str
) -> None:
    """Beside it a step copies its factors, once, and whatever weights of the adapter the policy brings layer by layer;
    it reads nothing. Whether latents are finite is looked up five times a clip, not more."""
    clip = replace(CLIP, steps=12)
    theirs = of_diffusers(accelerator, folders["5b"], offload, clip)
    mirror = build(accelerator.device, offload=offload)
    ours = per_step(accelerator, lambda after: mirror.sample(clip, build_identity(), on_step=after))
    streamed = memory.sampling_parts(mirror.adapter) if offload in ("group", "sequential") else []
    brought = sum(len([*layer.parameters()]) for layer in streamed)
    for own, other in zip(ours, theirs, strict=True):
        assert own["to device"] <= other["to device"] + 1 + brought
        assert own["values read"] == other["values read"]
    plain = per_step(accelerator, lambda after: mirror.sample(clip, on_step=after))
    for steps in (ours, plain):
        assert sum(own["to host"] - other["to host"] for own, other in zip(steps, theirs, strict=True)) <= 5
    assert all(own["to device"] <= other["to device"] for own, other in zip(plain, theirs, strict=True))


def test_lent_weights_are_not_copied_back(accelerator: Accelerator, build: Build) -> None:
    """The text encoder and the adapter visit the device; what waits on the CPU meanwhile is there when they leave."""
    build(accelerator.device, offload="model").encode_text("A dog smiles.")
    assert accelerator.traffic["to host"] == 1  # the embeddings
    mirror = build(accelerator.device)
    before = {name: tensor.clone() for name, tensor in mirror.adapter.state_dict().items()}
    mirror.sample(CLIP, build_identity())
    # Three prompts, the factors of three blocks, whether the latents are finite, and the latents.
    assert accelerator.traffic["to host"] <= 1 + 3 + 3 + STEPS + 1
    assert all(torch.equal(before[name], tensor.cpu()) for name, tensor in mirror.adapter.state_dict().items())


def test_offloading_saves_memory(accelerator: Accelerator, build: Build) -> None:
    """Each policy needs less than the one before it."""
    peaks = []
    for offload in POLICIES:
        mirror = build(accelerator.device, offload=offload)
        gc.collect()
        rest = accelerator.live_bytes
        accelerator.peak_bytes = rest
        mirror.sample(CLIP, build_identity())
        peaks.append(accelerator.peak_bytes)
        del mirror
        gc.collect()
    assert peaks == sorted(peaks, reverse=True) and len(set(peaks)) == len(peaks)


class Cancelled(Exception):
    """Raised by a user's interrupt."""


def kept(accelerator: Accelerator) -> int:
    """Bytes on the device, but for numbers: the positions of blocks, the last timestep."""
    gc.collect()
    return accelerator.live_bytes // 1000


@pytest.mark.parametrize("offload", POLICIES)
def test_a_cancelled_clip_leaves_nothing(
    accelerator: Accelerator, build: Build, on_cpu: Callable[[str, int], Clip], offload: str
) -> None:
    mirror = build(accelerator.device, offload=offload)
    mirror.sample(CLIP, build_identity(1))
    rest = kept(accelerator)
    assert bool(rest) == (offload == "none")

    def cancel(done: int, steps: int, preview: Callable[[], Any]) -> None:
        preview()
        if done == 2:
            raise Cancelled

    with pytest.raises(Cancelled):
        mirror.sample(CLIP, build_identity(1), on_step=cancel)
    assert kept(accelerator) == rest
    assert torch.equal(mirror.sample(CLIP, build_identity()), on_cpu("fp32", 0).latents)


@pytest.mark.parametrize("offload", POLICIES)
@pytest.mark.parametrize("stage", ["text", "factors", "step", "decode"])
def test_too_little_memory(
    accelerator: Accelerator,
    build: Build,
    on_cpu: Callable[[str, int], Clip],
    stage: str,
    offload: str,
) -> None:
    """Wherever it ends: an error with a remedy, latents kept, the device as before, and the next clip right."""
    mirror = build(accelerator.device, offload=offload)
    latents = mirror.sample(CLIP, build_identity(1))
    rest = kept(accelerator)

    def fill(*_: Any) -> None:
        accelerator.limit_bytes = accelerator.live_bytes + 100

    # In the middle of a model, where hooks have brought weights.
    where = dict(
        text=mirror.text.module.encoder.block[0].layer[0].SelfAttention.o,
        factors=mirror.adapter.blocks["2"].face_modulation,
        step=mirror.pipeline.transformer.transformer_blocks[2].ff,
        decode=mirror.pipeline.vae.decoder.mid_block.resnets[1].conv2,
    )
    hook = where[stage].register_forward_pre_hook(fill)
    if stage == "decode":
        with pytest.raises(DecodeError, match="tiles") as told:
            mirror.decode(latents)
        assert torch.equal(told.value.latents, latents)
    else:
        clip = replace(CLIP, prompt="A man img smiles.") if stage == "text" else CLIP
        with pytest.raises(OutOfMemoryError, match="offload") as told:
            mirror.sample(clip, build_identity(1))
        assert ("text encoder" if stage == "text" else "9 frames of 48 x 32") in str(told.value)
    hook.remove()
    del told
    accelerator.limit_bytes = None
    assert kept(accelerator) == rest
    assert torch.equal(mirror.sample(CLIP, build_identity()), on_cpu("fp32", 0).latents)


@pytest.mark.skipif(
    Version(diffusers.__version__) < Version("0.41"), reason="diffusers before 0.41 prefetches on CUDA and XPU only"
)
def test_groups_with_prefetching(
    accelerator: Accelerator, build: Build, on_cpu: Callable[[str, int], Clip], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on CUDA, where the next block comes while one computes: right after an error in the very first pass too."""
    monkeypatch.setattr(memory, "STREAMING", ("simgpu",))
    mirror = build(accelerator.device, offload="group")
    hook = mirror.pipeline.transformer.transformer_blocks[2].ff.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        mirror.sample(CLIP, build_identity(1))
    hook.remove()
    assert kept(accelerator) == 0
    for person in (1, 0):
        assert torch.equal(mirror.generate(CLIP, build_identity(person)).frames, on_cpu("fp32", person).frames)
        assert kept(accelerator) == 0


@pytest.mark.parametrize("frames", [1, 7])
@pytest.mark.parametrize("part", [None, 1 / 2, 1 / 4])
def test_decoding_needs_what_was_counted(
    accelerator: Accelerator, folders: dict[str, Path], part: float | None, frames: int
) -> None:
    """Before the first try it is known what each size of tiles holds at once."""
    vae, latents = FolderBase(folders["5b"]).load_vae(torch.float32).to(accelerator.device), noise(1, 4, frames, 18, 22)
    expected = decode.decode_bytes(vae.config, vae.dtype, latents.shape, part)
    needed = math.ceil(decode._MARGIN * expected)
    assert decode.choose_tiles(vae.config, vae.dtype, latents.shape, needed) == part
    assert decode.choose_tiles(vae.config, vae.dtype, latents.shape, needed - 1) == (part or 1) / 2
    rest = accelerator.peak_bytes = accelerator.live_bytes
    accelerator.limit_bytes = rest + needed
    frames = decode.decode(vae, latents, accelerator.device, needed)
    assert accelerator.peak_bytes - rest == pytest.approx(expected, rel=0.1)
    assert frames.shape[1:] == (144, 176, 3)
