"""Bases in 8 and 4 bits make nearly the same clip, wherever they rest, and the adapter on them is exact."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import pytest
import torch
from accelerator import simulated
from lora_files import write_loras
from tiny_models import assert_near
from torch import Tensor, nn

from mm_core import choices, memory
from mm_core.choices import POLICIES, PRECISIONS, QUANTISED, STORED, check_precision, precisions
from mm_core.errors import SettingError
from mm_core.examples import example_identity
from mm_core.memory import size_in_bytes
from mm_core.pipelines.base import TinyBase
from mm_core.pipelines.clip import ClipSettings
from mm_core.pipelines.lora import Lora
from mm_core.pipelines.magic_mirror import MagicMirror
from mm_core.pipelines.parts import load_transformer
from mm_core.pipelines.quantised import shrink

CPU = torch.device("cpu")
CLIP = ClipSettings(
    prompt="A person img smiles.", width=32, height=32, num_frames=9, steps=2, guidance_scale=3.0,
    dynamic_guidance=False, scheduler="ddim",
)  # fmt: skip
# Of the latents, relative to float32's.
DEVIATION = {"auto": 0, "fp32": 0, "bf16": 0.05, "fp16": 0.05, "fp8": 0.2, "int8": 0.05, "nf4": 0.3}

pytestmark = pytest.mark.skipif(
    any(find_spec(package) is None for package in QUANTISED["nf4"]), reason="torchao or bitsandbytes is missing"
)


@pytest.fixture(scope="module", autouse=True)
def kernels_of_every_machine() -> Iterator[None]:
    """bitsandbytes computes in bf16, whatever it is asked for, on a CPU that has instructions for it, and compiles for
    minutes on a device that it has no kernels for."""
    import bitsandbytes.nn.modules as layers

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "has_avx512bf16", lambda: False)
        patch.setattr(torch._dynamo.config, "disable", True)
        yield


@cache
def model(precision: str) -> MagicMirror:
    return MagicMirror(TinyBase(), precision=precision, device=CPU)


def sample(mirror: MagicMirror, **settings: object) -> Tensor:
    return mirror.sample(replace(CLIP, **settings), example_identity("woman")).float()


@cache
def clip(precision: str) -> Tensor:
    return sample(model(precision))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_clip_is_near(precision: str) -> None:
    deviation = float((clip(precision) - clip("fp32")).norm() / clip("fp32").norm())
    print(f"{precision}: {deviation:.3f}")
    assert deviation <= DEVIATION[precision]
    assert bool(deviation) == (precision not in ("auto", "fp32"))


@pytest.mark.parametrize("precision", STORED)
def test_steps_are_reused(precision: str) -> None:
    mirror, calls = model(precision), []
    layer = mirror.pipeline.transformer.transformer_blocks[1].attn1.to_out[0]
    hook = layer.register_forward_pre_hook(lambda *_: calls.append(None))
    latents = sample(mirror, steps=16, step_cache="fast")
    hook.remove()
    assert len(calls) < 16 and latents.isfinite().all()


@pytest.mark.parametrize("precision", QUANTISED)
def test_the_adapter_on_it_is_exact(precision: str) -> None:
    """The clip is that of a float32 base with the quantised one's weights, the adapter and T5 the same; q, k and v may
    be fused."""
    mirror, plain = model(precision), MagicMirror(TinyBase(), precision="fp32", device=CPU)
    plain.text = mirror.text
    base = mirror.base
    quantised = load_transformer(base.transformer_config, base.transformer_files, torch.float32, precision)
    for layer, other in zip(quantised.modules(), plain.pipeline.transformer.modules(), strict=True):
        if isinstance(layer, nn.Linear):
            other.weight.data = widened(layer.weight)
    assert {weight.dtype for weight in mirror.adapter.parameters()} == {torch.float32}
    assert_near(sample(plain), clip(precision), 1e-4)
    plain.pipeline.transformer.fuse_qkv_projections()
    assert_near(sample(plain), clip(precision), 1e-4)


def widened(weight: Tensor) -> Tensor:
    if hasattr(weight, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state)
    return weight.dequantize() if hasattr(weight, "dequantize") and weight.dtype == torch.float32 else weight.data


@pytest.mark.parametrize(("precision", "policy"), list(product(QUANTISED, POLICIES)))
def test_wherever_it_rests(precision: str, policy: str) -> None:
    with simulated() as accelerator:
        def build() -> MagicMirror:
            return MagicMirror(TinyBase(), precision=precision, offload=policy, device=accelerator.device)

        if precision == "nf4" and policy in ("group", "sequential"):
            with pytest.raises(SettingError, match="Choose model as offload, or int8"):
                build()
            return
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(memory, "compute_dtype", lambda *_: torch.float32)
            mirror = build()
        for _ in range(2):
            assert_near(sample(mirror), clip(precision), 1e-5)
            rest = accelerator.live_bytes
            assert (rest > 10**6) == (policy == "none")


@pytest.mark.parametrize("precision", QUANTISED)
def test_a_lora_acts_on_it(tmp_path: Path, precision: str) -> None:
    mirror = model(precision)
    path = write_loras(tmp_path, mirror.base.transformer_config)["kohya"]
    changed = mirror.sample(CLIP, example_identity("woman"), loras=[Lora.open(path, 1.0, mirror.base)])
    assert (changed - clip(precision)).norm() > 0.05 * clip(precision).norm()
    assert torch.equal(sample(mirror), clip(precision))


@pytest.mark.parametrize("precision", QUANTISED)
def test_its_bytes_are_those_planned(precision: str) -> None:
    """Of transformer and text encoder, without their files."""
    mirror = model(precision)
    clip(precision)
    base = mirror.base.load(torch.float32)
    for planned, there in ((base.transformer, mirror.pipeline.transformer), (base.text_encoder, mirror.text.module)):
        shrink(planned.to("meta"), precision)
        assert size_in_bytes(planned) == pytest.approx(size_in_bytes(there), rel=0.02)


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "find_spec", lambda name: None if name == "bitsandbytes" else name)
    assert "nf4" not in precisions() and "int8" in precisions()
    with pytest.raises(SettingError, match=r"nf4 needs bitsandbytes, .* python -m pip install bitsandbytes"):
        check_precision("nf4")
