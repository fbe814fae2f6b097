"""The published sizes, on `meta`: shapes, parameters and arithmetic without memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel

from mm_core.benchmark.measure import compare
from mm_core.counting import GIB, GPUS
from mm_core.hosts.cogvideox_diffusers import STATE, attach
from mm_core.models.adapter import MagicMirrorAdapter
from mm_core.models.block import FaceState
from mm_core.models.config import AdapterConfig
from mm_core.models.modulation import BlockFactors
from mm_core.pipelines.presets import PRESETS

META = torch.device("meta")


def published(model: str) -> tuple[CogVideoXTransformer3DModel, MagicMirrorAdapter]:
    with META:
        transformer = CogVideoXTransformer3DModel(**PRESETS[model].transformer)
        adapter = MagicMirrorAdapter(AdapterConfig.for_base(PRESETS[model].transformer))
    return transformer.requires_grad_(False), adapter.requires_grad_(False)


def forward(transformer: CogVideoXTransformer3DModel, state: FaceState | None = None) -> torch.Size:
    """One step of 49 frames of 480 x 720 without guidance; 1.5 pads 13 latent frames to 14."""
    config = transformer.config
    frames = 13 if config.patch_size_t is None else 14
    tokens = frames // (config.patch_size_t or 1) * 30 * 45
    rotary = tuple(torch.empty(tokens, config.attention_head_dim, device=META) for _ in range(2))
    return transformer(
        hidden_states=torch.empty(1, frames, 16, 60, 90, device=META),
        encoder_hidden_states=torch.empty(1, 226, config.text_embed_dim, device=META),
        timestep=torch.empty(1, device=META),
        image_rotary_emb=rotary if config.use_rotary_positional_embeddings else None,
        attention_kwargs=None if state is None else {STATE: state},
    ).sample.shape


def sampling_state(adapter: MagicMirrorAdapter) -> FaceState:
    """What a step of sampling gets: all factors computed before."""
    blocks, size = len(adapter.config.adapted_layers), adapter.config.hidden_size
    face, can = (torch.empty(blocks, 1, factors, size, device=META) for factors in (6, 12))
    tokens = torch.empty(1, adapter.config.num_face_tokens, size, device=META)
    return FaceState.entering(tokens, BlockFactors(face=face, can=can), torch.empty((), device=META))


@pytest.mark.parametrize(
    ("model", "parameters", "tensors"),
    [
        ("CogVideoX-5b", 1_773_973_120, 403),
        ("CogVideoX-2b", 892_077_568, 307),
        ("CogVideoX1.5-5B", 1_773_973_120, 403),
    ],
)
def test_adapter_size(model: str, parameters: int, tensors: int) -> None:
    """The adapter of each published model has as many parameters and tensors as docs/checkpoint.md adds up to."""
    _, adapter = published(model)
    assert sum(parameter.numel() for parameter in adapter.parameters()) == parameters
    assert len(adapter.state_dict()) == tensors
    assert adapter.config.adapted_layers == tuple(range(0, PRESETS[model].transformer["num_layers"], 2))


@pytest.mark.parametrize("model", PRESETS)
def test_forward_passes(model: str) -> None:
    """An adapted forward of every published model gives a prediction of the latents' shape."""
    transformer, adapter = published(model)
    attached = attach(transformer, adapter)
    frames = 13 if PRESETS[model].transformer.get("patch_size_t") is None else 14
    assert forward(transformer, attached.ready(sampling_state(adapter))) == (1, frames, 16, 60, 90)


@pytest.mark.parametrize("fp8", [False, True])
def test_cost_of_a_step(fp8: bool) -> None:
    """With guidance a step with the identity costs no more arithmetic, traffic and time than a few thousandths above
    the base model's, and little more memory than its keys and values."""
    compared = compare("CogVideoX-5b", fp8=fp8)
    page = json.loads((Path(__file__).parents[2] / "docs" / "benchmark.json").read_text())
    assert page["counts"]["CogVideoX-5b"]["fp8" if fp8 else "bf16"] == compared.numbers()
    base, adapted = compared.base, compared.adapted
    assert base.flops == pytest.approx(2 * 332.2e12, rel=0.001)
    assert 1 < adapted.flops / base.flops <= 1.0025
    assert adapted.bytes / base.bytes <= 1.003
    for name, gpu in GPUS.items():
        assert adapted.seconds(gpu) / base.seconds(gpu) <= 1.003, name
    assert adapted.peak / base.peak <= 1.02
    assert compared.extra <= (0.45 if fp8 else 0.85) * GIB
