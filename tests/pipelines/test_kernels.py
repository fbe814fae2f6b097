"""The kernels that a user chooses act in every block, whatever holds the weights, and change no clip."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerator import Accelerator
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from tiny_models import assert_near, build_identity
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from mm_core import memory
from mm_core.choices import POLICIES
from mm_core.errors import SettingError
from mm_core.pipelines import kernels
from mm_core.pipelines.base import FolderBase
from mm_core.pipelines.clip import ClipSettings
from mm_core.pipelines.control import AdapterSettings
from mm_core.pipelines.magic_mirror import MagicMirror

CPU = torch.device("cpu")
CLIP = ClipSettings(
    prompt="A woman img smiles.", width=48, height=32, num_frames=9, steps=3, guidance_scale=3.0, scheduler="ddim"
)


def mirror_of(folder: Path, device: torch.device = CPU, **settings: object) -> MagicMirror:
    settings = dict(precision="fp32", device=device) | settings
    return MagicMirror(FolderBase(folder), adapter=folder / "adapter.safetensors", **settings)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """A package that is not installed, registered with diffusers' dispatcher; it counts its calls by rows and keys."""
    for name in ("_backends", "_constraints", "_supported_arg_names"):
        monkeypatch.setattr(_AttentionBackendRegistry, name, dict(getattr(_AttentionBackendRegistry, name)))
    monkeypatch.setattr(attention_dispatch, "_CAN_USE_SAGE_ATTN", True)
    calls: Counter[tuple[int, int]] = Counter()

    def attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
        calls[(len(query), key.shape[1])] += 1
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value)

    _AttentionBackendRegistry.register(AttentionBackendName.SAGE)(attention)
    yield calls


@pytest.mark.parametrize("offload", POLICIES)
def test_attention_acts_in_every_block(
    accelerator: Accelerator, folders: dict[str, Path], stand_in: Counter, offload: str
) -> None:
    """Plain blocks with both rows; adapted ones with the row without identity, with the other, and with the face."""
    native = mirror_of(folders["5b"]).sample(CLIP, build_identity())
    mirror = mirror_of(folders["5b"], accelerator.device, offload=offload, attention="sage")
    stand_in.clear()  # of the trial
    latents = mirror.sample(CLIP, build_identity())
    assert_near(latents, native, 1e-5)
    transformer = mirror.loaded.pipe.transformer
    joint, adapted = transformer.config.max_text_seq_length + 3 * 3 * 2, len(mirror.header.config.adapted_layers)
    plain, face = len(transformer.transformer_blocks) - adapted, mirror.header.config.num_face_tokens
    by_call = {(2, joint): plain, (1, joint): adapted, (1, joint + face): adapted, (1, face): adapted}
    assert stand_in == {call: CLIP.steps * blocks for call, blocks in by_call.items()}
    assert _AttentionBackendRegistry.get_active_backend()[0] == AttentionBackendName.NATIVE


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(attention="sage"), r"attention is sage.*install `sageattention.*Or choose native"),
        (dict(attention="fast"), "attention is 'fast'; choose one of native, flash, sage, xformers"),
    ],
)
def test_kernels_that_are_not_here_are_refused(folders: dict[str, Path], settings: dict, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        mirror_of(folders["5b"], **settings)


def test_a_device_that_a_kernel_does_not_know(folders: dict[str, Path], stand_in: Counter) -> None:
    """What the package itself says is told; the real ones assert, or raise, on a CPU."""

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        raise AssertionError("Input tensors must be on cuda.")

    _AttentionBackendRegistry.register(AttentionBackendName.SAGE)(attention)
    with pytest.raises(SettingError, match="does not run on cpu in float32 here: Input tensors must be on cuda"):
        mirror_of(folders["5b"], attention="sage")


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> CompileCounterWithBackend:
    """torch.compile without a compiler, counting graphs."""
    torch._dynamo.reset()
    monkeypatch.setattr(kernels, "find_spec", lambda name: True)
    backend = CompileCounterWithBackend("eager")
    monkeypatch.setattr(kernels.torch, "compile", functools.partial(torch.compile, backend=backend))
    return backend


def test_compiled_once_for_all_people(folders: dict[str, Path], graphs: CompileCounterWithBackend) -> None:
    """Another person, prompt, strength or step cache compiles nothing again; the clip is that of blocks as they are."""
    mirror = mirror_of(folders["5b"], compile=True)
    assert_near(mirror.sample(CLIP, build_identity()), mirror_of(folders["5b"]).sample(CLIP, build_identity()), 1e-5)
    assert graphs.frame_count == 3  # the first block's inputs are slices, the others' are not
    mirror.sample(replace(CLIP, prompt="A man img runs."), build_identity(5), AdapterSettings(identity_scale=0.5))
    mirror.sample(replace(CLIP, step_cache="fast"), build_identity(6))
    assert graphs.frame_count == 3


def test_compiled_under_hooks(
    folders: dict[str, Path], graphs: CompileCounterWithBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block's hooks stay outside; a layer's, as those of fp8, cut its graph. Another person adds none there either.

    On the CPU, with the hooks of an accelerator: Dynamo does not trace a simulated one.
    """
    monkeypatch.setattr(memory, "choose_policy", lambda policy, *_: policy)
    clip, how = replace(CLIP, steps=1), dict(offload="group", precision="fp8")
    mirror = mirror_of(folders["5b"], **how, compile=True)
    latents, once = mirror.sample(clip, build_identity()), graphs.frame_count
    assert_near(latents, mirror_of(folders["5b"], **how).sample(clip, build_identity()), 1e-5)
    mirror.sample(clip, build_identity(5))
    assert graphs.frame_count == once > 3


@pytest.mark.parametrize(
    ("module", "name", "value", "message"),
    [
        ("torch", "__version__", torch.torch_version.TorchVersion("2.6.0"), "torch 2.6.0 .* 2.8 or newer"),
        ("shutil", "which", lambda name: None, r"a C\+\+ compiler"),
    ],
)
def test_where_nothing_compiles_it_is_refused(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, module: str, name: str, value: object, message: str
) -> None:
    monkeypatch.setattr(getattr(kernels, module), name, value)
    with pytest.raises(SettingError, match=message):
        mirror_of(folders["5b"], compile=True)
