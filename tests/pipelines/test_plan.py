"""What a clip needs is known before anything is loaded, and is what it then takes."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from accelerator import Accelerator
from tiny_models import build_identity

from mm_core import memory
from mm_core.choices import POLICIES
from mm_core.pipelines import magic_mirror, sampling
from mm_core.pipelines.base import FolderBase
from mm_core.pipelines.clip import ClipSettings
from mm_core.pipelines.magic_mirror import MagicMirror
from mm_core.pipelines.plan import Plan, published_plan
from mm_core.pipelines.presets import PRESETS

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


def test_it_is_said_in_a_line(published: Callable[..., Plan]) -> None:
    line = published("CogVideoX-5b").line("group", (11 * 10**9, 12 * 10**9))
    assert line.startswith("plan: ") and "11.0 of 12.0 GB are free" in line and "offload group: at most 3.5 GB" in line
    assert "ComfyUI" in published("CogVideoX-5b").line("auto", None)
