"""What a clip needs is known before anything is loaded, and is what it then takes."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerator import Accelerator
from diffusers import CogVideoXTransformer3DModel
from tiny_models import build_identity
from torch import nn
from transformers import T5Config, T5EncoderModel

from mm_core import memory
from mm_core.choices import POLICIES
from mm_core.counting import counted
from mm_core.hosts.cogvideox_diffusers import attach
from mm_core.memory import size_in_bytes
from mm_core.models.adapter import MagicMirrorAdapter
from mm_core.models.config import AdapterConfig
from mm_core.models.id_encoder import FaceFeatures
from mm_core.pipelines import conditioning, magic_mirror, sampling
from mm_core.pipelines.base import FolderBase
from mm_core.pipelines.clip import ClipSettings
from mm_core.pipelines.control import AdapterSettings
from mm_core.pipelines.identity import Identity
from mm_core.pipelines.magic_mirror import MagicMirror
from mm_core.pipelines.plan import PHASES, Plan, published_plan
from mm_core.pipelines.presets import PRESETS, T5_XXL

CLIP = ClipSettings(
    prompt="A woman img smiles.", width=96, height=64, num_frames=17, steps=4, guidance_scale=3.0, scheduler="dpm"
)


@pytest.mark.parametrize("policy", POLICIES)
def test_peaks_are_those_predicted(
    accelerator: Accelerator, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    """Within 10%, in every phase under every policy; under `group`, as on CUDA, the next block is there too."""
    monkeypatch.setattr(memory, "STREAMING", ("simgpu",))
    base, seen = FolderBase(folders["5b"]), {}
    mirror = MagicMirror(
        base, adapter=base.folder / "adapter.safetensors", precision="fp32", offload=policy, device=accelerator.device
    )

    def watched(phase: str, owner: Any, name: str, **changes: Any) -> None:
        original: Callable[..., Any] = getattr(owner, name)

        def run(*args: Any) -> Any:
            gc.collect()
            accelerator.peak_bytes = accelerator.live_bytes
            result = original(*args, **changes)
            seen[phase] = max(accelerator.peak_bytes, seen.get(phase, 0))
            return result

        monkeypatch.setattr(owner, name, run)

    mirror.sample(CLIP, build_identity())
    watched("text", mirror.text, "_run")
    watched("identity", sampling, "_condition")
    watched("steps", sampling, "denoise")
    decode = magic_mirror.decode
    monkeypatch.setattr(magic_mirror, "decode", lambda vae, latents, device, free: decode(vae, latents, device, 0))
    watched("decoding", magic_mirror, "decode")
    mirror.text._embeds.clear()
    mirror.generate(CLIP, build_identity())
    plan = mirror.plan(CLIP, build_identity())
    print(seen, plan)
    assert seen == {phase: pytest.approx(peak, rel=0.1) for phase, peak in plan.peaks(policy).items()}


@pytest.fixture(scope="module")
def published() -> Callable[..., Plan]:
    def build(name: str, stored: str | None = None) -> Plan:
        return published_plan(PRESETS[name], stored)

    return build


def test_published_models(published: Callable[..., Plan]) -> None:
    """Counted at full size: the published weights, and what the small cards need."""
    plan = published("CogVideoX-5b")
    assert plan.weights["transformer"] == pytest.approx(11.1e9 + 0.8e9, rel=0.02)
    assert plan.weights["text_encoder"] == pytest.approx(9.5e9, rel=0.02)
    assert plan.beside["steps"] == pytest.approx(2.64 * 2**30 + 2**25, rel=0.01)  # with cuBLAS's own
    assert plan.whole == pytest.approx(14.73 * 2**30, rel=0.01)
    chosen = {room: plan.choose(room * 2**30) for room in (6, 12, 16, 24, 48)}
    assert chosen == {6: "group", 12: "group", 16: "model", 24: "none", 48: "none"}
    assert published("CogVideoX-5b", "fp8").choose(11 * 2**30) == "model"
    assert published("CogVideoX-2b").choose(7 * 2**30) == "group"
    assert published("CogVideoX-5b", "nf4").choose(7 * 2**30) == "model"
    assert max(published("CogVideoX-5b", "nf4").peaks("model").values()) < 6.3 * 2**30


def test_a_full_accounting_agrees(published: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan counts one block of each model and of the adapter. All blocks of CogVideoX-5B on `meta`, with what they
    compute on: within 5% of the peak of each phase. (The steps are those of docs/benchmark.md, which has its own test;
    decoding is compared at every size of tiles in test_device.py.)"""
    plan = published("CogVideoX-5b")
    page = json.loads((Path(__file__).parents[2] / "docs" / "benchmark.json").read_text(encoding="utf-8"))
    steps = page["counts"]["CogVideoX-5b"]["bf16"]["adapted"]["activations"]
    with torch.device("meta"):
        encoder = T5EncoderModel(T5Config(**T5_XXL)).to(torch.bfloat16).eval()
        with counted() as text:
            encoder(torch.zeros(1, 226, dtype=torch.long))
    found = {"text": text.peak, "identity": identity_peak(monkeypatch), "steps": steps}
    for phase, peak in found.items():
        alone = plan.beside[phase] - 2**25  # of cuBLAS, which `meta` has not
        print(f"{phase}: {alone / peak:.3f} of what is beside the weights")
        whole = plan.weights[PHASES[phase]]
        assert whole + alone == pytest.approx(whole + peak, rel=0.05)
        assert alone == pytest.approx(peak, rel=0.1)


def identity_peak(monkeypatch: pytest.MonkeyPatch) -> int:
    """Of what the identity adds before the first of two steps, with the weights that visit the device for it."""
    sizes = dict(PRESETS["CogVideoX-5b"].transformer)
    with torch.device("meta"):
        transformer = CogVideoXTransformer3DModel(**sizes).to(torch.bfloat16).eval()
        adapter = MagicMirrorAdapter(AdapterConfig.for_base(sizes)).to(torch.bfloat16).eval()
        config = adapter.config
        tokens = torch.empty(1, config.num_id_tokens, config.id_token_dim)
        features = FaceFeatures(id_tokens=tokens, structure_tokens=torch.empty(1, 257, config.clip_hidden_size))
    peaks: list[int] = []

    @contextmanager
    def lent(modules: Iterable[nn.Module], device: torch.device) -> Iterator[None]:
        live.peak = live.alive
        yield
        peaks.append(live.peak + sum(map(size_in_bytes, modules)))

    monkeypatch.setattr(conditioning, "on_device", lent)
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: x.new_empty(1).expand(x.shape))  # nothing is there afterwards
    identity = Identity(features=features, references=(SimpleNamespace(weight=1.0),))
    with torch.device("meta"), counted() as live:
        embeds = torch.empty(1, 226, 4096, dtype=torch.bfloat16)
        steps = torch.zeros(2)
        conditioning.condition(
            attach(transformer, adapter), identity, embeds, (1, 2), steps, AdapterSettings(), torch.device("meta")
        )
    return max(peaks)


def test_it_is_said_in_a_line(published: Callable[..., Plan]) -> None:
    line = published("CogVideoX-5b").line("group", (11 * 10**9, 12 * 10**9))
    assert line.startswith("plan: ") and "11.0 of 12.0 GB are free" in line and "offload group: at most 3.5 GB" in line
    assert "ComfyUI" in published("CogVideoX-5b").line("auto", None)
