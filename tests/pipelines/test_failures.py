"""A model that overflows or does not fit is told with a remedy, and the next clip is as if nothing had been."""

from __future__ import annotations

import copy
import gc
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerator import simulated
from tiny_models import build_identity, noise
from torch import nn

from mm_core.errors import DecodeError, NumericsError, OutOfMemoryError
from mm_core.pipelines.base import FolderBase
from mm_core.pipelines.clip import ClipSettings
from mm_core.pipelines.magic_mirror import MagicMirror

CPU = torch.device("cpu")
CLIP = ClipSettings(prompt="a man img reading", width=48, height=32, num_frames=9, steps=4)


@pytest.fixture
def mirror(folders: dict[str, Path]) -> MagicMirror:
    """One of its own, to be damaged."""
    return MagicMirror(FolderBase(folders["5b"]), adapter=folders["5b"] / "adapter.safetensors", device=CPU)


@pytest.fixture
def overflow(mirror: MagicMirror) -> Iterator[list[int]]:
    """Forward passes of the transformer, from 1, after which its output is not finite."""
    at: list[int] = []
    runs = 0

    def spoil(_: nn.Module, __: object, output: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        nonlocal runs
        runs += 1
        return (output[0].index_fill(0, torch.tensor(0), float("inf")),) if runs in at else output

    handle = mirror.pipeline.transformer.register_forward_hook(spoil)
    yield at
    handle.remove()


@pytest.mark.parametrize("step", [1, 2, 4])
@pytest.mark.parametrize("identity", [None, build_identity()], ids=["plain", "identity"])
def test_latents_that_are_not_finite(mirror: MagicMirror, overflow: list[int], step: int, identity: object) -> None:
    overflow.append(step)
    with pytest.raises(NumericsError, match=rf"After step {step} of 4 the latents are not finite .* in fp32\. "):
        mirror.generate(CLIP, identity)
    overflow.clear()
    assert mirror.generate(CLIP, identity).frames.isfinite().all()


def test_fp16_is_told_its_limit(folders: dict[str, Path]) -> None:
    mirror = MagicMirror(FolderBase(folders["5b"]), precision="fp16", device=CPU)
    mirror.pipeline.transformer.proj_out.weight.mul_(1e5)
    with pytest.raises(NumericsError, match=r"fp16 ends at 65,504\. Choose bf16"):
        mirror.sample(CLIP)


def test_frames_that_are_not_finite_carry_the_latents(mirror: MagicMirror) -> None:
    latents = noise(1, 4, 3, 4, 6)
    weight = mirror.pipeline.vae.decoder.conv_out.conv.weight
    kept = weight.clone()
    weight[0] = float("nan")
    with pytest.raises(DecodeError, match=r"decoded frames are not finite .* in fp32\. .*decode the latents") as error:
        mirror.decode(latents)
    assert torch.equal(error.value.latents, latents)
    weight.copy_(kept)
    assert mirror.decode(latents).frames.isfinite().all()


def test_latents_that_are_no_clip(mirror: MagicMirror) -> None:
    latents = noise(1, 4, 3, 4, 6)
    latents[0, 0, 0, 0, 0] = float("inf")
    with pytest.raises(DecodeError, match=r"latents that were to be decoded are not finite .*sample it again"):
        mirror.decode(latents)


def test_the_vae_alone_decodes(mirror: MagicMirror, folders: dict[str, Path], tmp_path: Path) -> None:
    """Where nothing is loaded, as on ComfyUI's own route, neither transformer nor text encoder is read for it."""
    latents = noise(1, 4, 3, 4, 6)
    expected = mirror.loaded and mirror.decode(latents).frames
    alone = Path(shutil.copytree(folders["5b"], tmp_path / "5b"))
    base = FolderBase(alone)
    for path in (*base.transformer_files, *base.text_encoder_files):
        path.unlink()
    assert torch.equal(MagicMirror(base, device=CPU).decode(latents).frames, expected)


@pytest.mark.parametrize("policy", ["none", "model"])
def test_too_little_memory_to_sample(folders: dict[str, Path], policy: str) -> None:
    """Told with what was asked and what to try; with room again, the same model makes the clip."""
    folder = folders["5b"]
    with simulated() as accelerator:
        mirror = MagicMirror(
            FolderBase(folder), adapter=folder / "adapter.safetensors", precision="fp32", offload=policy,
            device=accelerator.device,
        )  # fmt: skip
        identity = copy.deepcopy(build_identity())
        expected = mirror.sample(CLIP, identity)
        rest = accelerator.live_bytes
        accelerator.limit_bytes = rest + 10_000
        with pytest.raises(OutOfMemoryError, match=rf"9 frames of 48 x 32 \(offload {policy}, fp32\)") as error:
            mirror.sample(CLIP, identity)
        accelerator.limit_bytes = None
        del error
        gc.collect()
        assert accelerator.live_bytes <= rest
        assert torch.equal(mirror.sample(CLIP, identity), expected)
