"""Offloading changes nothing in the clip, everything lent to the device comes back, and weights exist once."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerator import Accelerator, simulated
from diffusers.hooks.group_offloading import ModuleGroup
from lora_files import write_loras
from tiny_models import PROMPT_TOKENS, TRANSFORMERS, build_identity, noise, save_tiny_folder
from torch import Tensor, nn
from transformers import T5EncoderModel

from mm_core import memory
from mm_core.checkpoints.adapter_file import Trained, save_adapter
from mm_core.checkpoints.lora_file import open_lora
from mm_core.checkpoints.lora_keys import layer_shapes
from mm_core.choices import POLICIES
from mm_core.errors import SettingError
from mm_core.memory import choose_policy, compute_dtype, keys_and_values, on_device, size_in_bytes
from mm_core.models.adapter import MagicMirrorAdapter
from mm_core.models.config import AdapterConfig
from mm_core.pipelines.base import FolderBase
from mm_core.pipelines.clip import ClipSettings
from mm_core.pipelines.lora import Lora
from mm_core.pipelines.magic_mirror import MagicMirror

# Where the clip is computed, and where weights rest: the same memory under two names that can be told apart.
DEVICE, REST = torch.device("cpu", 0), torch.device("cpu")
CLIP = ClipSettings(prompt="a man img reading", width=48, height=32, num_frames=9, steps=3)


@dataclass(frozen=True)
class UntiedBase(FolderBase):
    """Its T5 embedding stands once: accelerate cannot bring in tied weights layer by layer on a CPU."""

    def load_text_encoder(self, dtype: torch.dtype, quantised: str | None = None) -> T5EncoderModel:
        encoder = super().load_text_encoder(dtype, quantised)
        encoder.encoder.embed_tokens = copy.deepcopy(encoder.shared)
        return encoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_folder("5b", tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def expected(folder: Path) -> tuple[Tensor, Tensor]:
    """Latents and frames of the clip with everything in its place all the time."""
    return run(MagicMirror(FolderBase(folder), adapter=folder / "adapter.safetensors", device=REST))


def run(mirror: MagicMirror) -> tuple[Tensor, Tensor]:
    clip = mirror.generate(CLIP, build_identity())
    return clip.latents, clip.frames


Build = Callable[..., MagicMirror]


@pytest.fixture
def build(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Build:
    """Makes the product under a policy that it would not choose for a CPU.

    diffusers brings layers in to "cpu:0", from where accelerate cannot take them back: that name is put right.
    """
    cpu_offload = memory.cpu_offload
    monkeypatch.setattr(memory, "cpu_offload", lambda part, execution_device: cpu_offload(part, REST))

    def build(policy: str, device: torch.device = REST) -> MagicMirror:
        monkeypatch.setattr(memory, "choose_policy", lambda *_: policy)
        return MagicMirror(UntiedBase(folder), adapter=folder / "adapter.safetensors", device=device)

    return build


class Whereabouts:
    """Follows where the layers of some modules are, by every way that they are moved."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.of: dict[nn.Module, torch.device] = {}
        move, onload, offload = nn.Module.to, ModuleGroup.onload_, ModuleGroup.offload_

        def to(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
            target = torch._C._nn._parse_to(*args, **kwargs)[0]
            if target is not None:
                self.of.update(dict.fromkeys(module.modules(), target))
            return move(module, *args, **kwargs)

        def group_moves(original: Any, target: torch.device) -> Any:
            def moved(group: ModuleGroup) -> None:
                for module in group.modules:
                    self.of.update(dict.fromkeys(module.modules(), target))
                original(group)

            return moved

        monkeypatch.setattr(nn.Module, "to", to)
        monkeypatch.setattr(ModuleGroup, "onload_", group_moves(onload, DEVICE))
        monkeypatch.setattr(ModuleGroup, "offload_", group_moves(offload, REST))

    def on_device(self, *roots: nn.Module) -> list[nn.Module]:
        """Layers with weights, below the roots, that are on the device now."""
        layers = [layer for root in roots for layer in root.modules() if list(layer.parameters(recurse=False))]
        return [layer for layer in layers if self.of.get(layer) == DEVICE]


@pytest.fixture
def whereabouts(monkeypatch: pytest.MonkeyPatch) -> Whereabouts:
    return Whereabouts(monkeypatch)


@pytest.mark.parametrize("policy", POLICIES)
def test_same_clip(build: Build, expected: tuple[Tensor, Tensor], policy: str) -> None:
    """Every policy gives the same bits, the second time too."""
    mirror = build(policy)
    for _ in range(2):
        for ours, theirs in zip(run(mirror), expected, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("policy", POLICIES)
def test_loras_come_and_go(
    build: Build, expected: tuple[Tensor, Tensor], whereabouts: Whereabouts, policy: str, tmp_path: Path
) -> None:
    """Under every policy a LoRA changes the clip as with all weights in their place, moves with them, and is gone from
    the next clip."""
    sizes = TRANSFORMERS["5b"] | dict(max_text_seq_length=PROMPT_TOKENS)
    path = write_loras(tmp_path, sizes)["kohya"]
    lora = Lora(file=open_lora(path, layer_shapes(sizes)), strength=1.0)
    changed = build("none").sample(CLIP, build_identity(), loras=[lora])
    mirror = build(policy)
    for _ in range(2):
        assert torch.equal(mirror.sample(CLIP, build_identity(), loras=[lora]), changed)
        whereabouts.of.clear()
        assert torch.equal(mirror.sample(CLIP, build_identity(), loras=[lora]), changed)
        matrix = mirror.pipeline.transformer.transformer_blocks[0].attn1.to_q.lora_A["magic_mirror"]
        assert (matrix in whereabouts.of) == (policy in ("model", "group"))
        assert hasattr(matrix, "_hf_hook") == (policy == "sequential")
        assert torch.equal(mirror.sample(CLIP, build_identity()), expected[0])
    assert not torch.equal(changed, expected[0])


class Cancelled(Exception):
    """Raised by a user's interrupt."""


def cancel(*_: object) -> None:
    raise Cancelled


def run_or_cancel(mirror: MagicMirror, cancelled: bool) -> None:
    """A whole run, or one that the user stops after the first step."""
    if not cancelled:
        run(mirror)
        return
    with pytest.raises(Cancelled):
        mirror.sample(CLIP, build_identity(), on_step=cancel)


RUNS = pytest.mark.parametrize("cancelled", [False, True], ids=["finished", "cancelled"])


@RUNS
def test_groups_return(build: Build, whereabouts: Whereabouts, cancelled: bool) -> None:
    """After a run, finished or not, no block or layer of the base is on the device."""
    mirror = build("group")
    run_or_cancel(mirror, cancelled)
    pipe = mirror.pipeline
    assert whereabouts.on_device(mirror.text.module, pipe.transformer, pipe.vae) == []
    assert pipe.transformer.transformer_blocks[0].attn1.to_q in whereabouts.of


@RUNS
def test_layers_return(build: Build, cancelled: bool) -> None:
    """After a run, finished or not, no layer that comes one by one is in memory twice."""
    mirror = build("sequential")
    run_or_cancel(mirror, cancelled)
    pipe = mirror.pipeline
    roots = (mirror.text.module, pipe.transformer, pipe.vae, mirror.adapter)
    hooked = [layer for root in roots for layer in root.modules() if hasattr(layer, "_hf_hook")]
    assert {weight.device.type for layer in hooked for weight in layer.parameters(recurse=False)} == {"meta"}
    assert mirror.adapter.blocks["2"].attn.to_v_ip in hooked


@pytest.mark.parametrize("policy", ["none", "model"])
def test_layers_of_the_adapter_run_on_the_device(build: Build, whereabouts: Whereabouts, policy: str) -> None:
    """Every layer of the adapter has been brought to the device when it runs, and all layers of it do run."""
    mirror = build(policy, DEVICE)
    elsewhere, ran = [], set()

    def note(layer: nn.Module, _: tuple[Any, ...]) -> None:
        ran.add(layer)
        if whereabouts.of.get(layer) != DEVICE:
            elsewhere.append(layer)

    layers = [layer for layer in mirror.adapter.modules() if list(layer.parameters(recurse=False))]
    for layer in layers:
        layer.register_forward_pre_hook(note)
    mirror.sample(CLIP, build_identity())
    assert elsewhere == []
    assert ran == set(layers)


def test_lent_modules_return(accelerator: Accelerator) -> None:
    """Whatever happens meanwhile, and also when one of them cannot be moved; those that were there stay."""
    modules, there = [nn.Linear(2, 2), nn.BatchNorm1d(2)], nn.Linear(2, 2).to(accelerator.device)
    modules[1].register_buffer("table", noise(4))

    def devices(*modules: nn.Module) -> set[str]:
        return {tensor.device.type for module in modules for tensor in module.state_dict().values()}

    with pytest.raises(Cancelled), on_device([*modules, there], accelerator.device):
        assert devices(*modules, there) == {"simgpu"}
        cancel()
    assert devices(*modules) == {"cpu"} and devices(there) == {"simgpu"}

    unmovable = nn.Linear(2, 2, device="meta")
    with pytest.raises(NotImplementedError), on_device([modules[0], unmovable], accelerator.device):
        pass
    assert devices(*modules) == {"cpu"} and unmovable.weight.is_meta


# A process of its own: in this one, memory that other tests let go meanwhile would hide what loading takes.
LOAD = """
import gc, re, sys
from pathlib import Path
from mm_core.checkpoints.adapter_file import load_adapter

def kilobytes(field):
    return int(re.search(rf"{field}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

path = Path(sys.argv[1])
load_adapter(path)
gc.collect()
Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is used now
before = kilobytes("VmRSS")
adapter, _ = load_adapter(path)
for parameter in adapter.parameters():
    parameter.sum()  # a mapped file counts once it is read
gc.collect()
print((kilobytes("VmHWM") - before) * 1024, (kilobytes("VmRSS") - before) * 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(("stored", "copies"), [(torch.float32, 2.25), (torch.bfloat16, 1.75)])
def test_loading_holds_one_copy(tmp_path: Path, stored: torch.dtype, copies: float) -> None:
    """Loading an adapter takes the memory of its weights once; meanwhile the file is mapped beside it, in pages that
    the system takes back where memory is short."""
    sizes = dict(num_attention_heads=1, attention_head_dim=8, num_layers=1, time_embed_dim=8, text_embed_dim=3072)
    config = AdapterConfig.for_base(sizes, id_token_dim=8, perceiver_dim=8, perceiver_dim_head=8, can_hidden_dim=8)
    adapter = MagicMirrorAdapter(config).to(stored)
    size = sum(parameter.numel() for parameter in adapter.parameters()) * 4
    assert 3072 * 3072 * 4 > 2**25  # the largest that the C library keeps for reuse when it is freed
    path = tmp_path / "adapter.safetensors"
    save_adapter(adapter, path, base_model="a/b", trained=Trained(stage="untrained", steps=0, data=""))
    command = [sys.executable, "-c", LOAD, str(path)]
    root = Path(__file__).parents[1]
    # Nothing that tells the C library to keep what is freed: the second load would seem smaller.
    env = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    # What the first load lets go late makes the second seem smaller, never larger: the largest of three counts.
    runs = [subprocess.run(command, cwd=root, env=env, check=True, capture_output=True, text=True) for _ in range(3)]
    peak, kept = (max(int(run.stdout.split()[place]) for run in runs) for place in (0, 1))
    assert 0.75 * size < kept < 1.25 * size
    assert peak < copies * size


def test_chosen_policy() -> None:
    """The user's choice stands; a CPU has nothing to offload to; an unknown name is told with the known ones."""

    def choose(policy: str, device: str) -> str:
        return choose_policy(policy, lambda free: "group", torch.device(device))

    for policy in POLICIES:
        assert choose(policy, "cuda") == policy
        assert choose(policy, "cpu") == "none"
    assert choose("auto", "mps") == "model"
    with pytest.raises(SettingError, match=r"'disk'.*auto, none, model, group, sequential"):
        choose("disk", "cpu")


def test_size_in_bytes() -> None:
    """Parameters and buffers by their own types."""
    module = nn.Linear(3, 5).half()
    module.register_buffer("table", noise(4))
    assert size_in_bytes(module) == 2 * (15 + 5) + 4 * 4


def test_precision() -> None:
    """A CPU computes in float32 unless told otherwise; an unknown name is told with the known ones."""
    cpu = torch.device("cpu")
    assert compute_dtype("auto", cpu) == compute_dtype("fp8", cpu) == torch.float32
    assert compute_dtype("bf16", cpu) == torch.bfloat16
    with pytest.raises(SettingError, match=r"'int4'.*auto, bf16, fp16, fp32, fp8"):
        compute_dtype("int4", cpu)


@pytest.mark.parametrize(("native", "dtype"), [(True, torch.bfloat16), (False, torch.float16)])
def test_emulated_bf16_does_not_count(monkeypatch: pytest.MonkeyPatch, native: bool, dtype: torch.dtype) -> None:
    """Turing has no bf16 but in software: torch says yes unless it is asked for the real thing."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation)
    assert compute_dtype("auto", torch.device("cuda")) == dtype


def test_fp8_where_there_is_none(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before anything is loaded; torch says that a device lacks a type in more than one way."""
    for error in (
        TypeError("Trying to convert Float8_e4m3fn to the MPS backend but it does not have support for that dtype."),
        RuntimeError('"copy_" not implemented for \'Float8_e4m3fn\''),
    ):

        def ones(*_: object, error: Exception = error, **__: object) -> Tensor:
            raise error

        monkeypatch.setattr(torch, "ones", ones)
        with pytest.raises(SettingError, match=r"precision is fp8, and the device cpu has no 8-bit floats .*Float8"):
            MagicMirror(FolderBase(folder), precision="fp8", device=REST)


def test_fp8(folder: Path, expected: tuple[Tensor, Tensor]) -> None:
    """Storing the transformer in 8 bits takes about a quarter of float32's memory and keeps the clip roughly."""
    mirror = MagicMirror(FolderBase(folder), adapter=folder / "adapter.safetensors", precision="fp8", device=REST)
    latents, _ = run(mirror)
    assert nn.functional.cosine_similarity(latents.flatten(), expected[0].flatten(), dim=0) > 0.9
    plain = FolderBase(folder).load(torch.float32).transformer
    assert size_in_bytes(mirror.pipeline.transformer) < 0.6 * size_in_bytes(plain)
    assert {layer.weight.dtype for layer in keys_and_values(mirror.adapter)} == {torch.float8_e4m3fn}
    assert mirror.adapter.id_proj.weight.dtype == torch.float32


@pytest.mark.parametrize("policy", [policy for policy in POLICIES if policy != "none"])
def test_fp8_under_every_policy(folder: Path, policy: str) -> None:
    """The same clip as with all in its place; keys and values are back, in 8 bits, after it."""
    clips = []
    for place in ("none", policy):
        with simulated() as accelerator:
            mirror = MagicMirror(
                UntiedBase(folder), adapter=folder / "adapter.safetensors", precision="fp8", offload=place,
                device=accelerator.device,
            )  # fmt: skip
            clips.append(mirror.sample(CLIP, build_identity()))
            weights = [layer.weight for layer in keys_and_values(mirror.adapter)]
            assert {weight.dtype for weight in weights} == {torch.float8_e4m3fn}
            assert {weight.device == accelerator.device for weight in weights} == {place == "none"}
    assert torch.equal(*clips)
