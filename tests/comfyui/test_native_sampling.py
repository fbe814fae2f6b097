"""The base alone on ComfyUI's own CogVideoX: core's samplers and ours make the clip that diffusers makes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_server import ComfyServer, ExecutionFailed
from native_graphs import GUIDANCE, SEED, STEPS, by_diffusers, native_graph, noise_of, plain, sampled, switched_off
from safetensors.torch import load_file, save_file
from torch import Tensor

from mm_core.pipelines.base import FolderBase

Bases = dict[str, tuple[FolderBase, Path]]
Portrait = Callable[[str], Path]


def with_ksampler(graph: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """Core's KSampler in the place of guider, noise, sampler and SamplerCustomAdvanced."""
    guider = graph["7"]["inputs"]
    inputs = dict(
        model=guider["model"], positive=guider["positive"], negative=guider["negative"], cfg=GUIDANCE, seed=SEED,
        steps=STEPS, sampler_name="euler", scheduler="simple", denoise=1.0, latent_image=["11", 0],
    )  # fmt: skip
    graph = {key: node for key, node in graph.items() if key not in ("7", "8", "9", "10")}
    return graph | {"12": {"class_type": "KSampler", "inputs": inputs | settings}}


def ksamplers_noise(kind: str) -> Tensor:
    """What core draws for the seed."""
    return torch.randn(noise_of(kind).shape, generator=torch.Generator().manual_seed(SEED))


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("kind", ["1.0", "1.5", "2b", "1.0 by core", "2b by core"])
@pytest.mark.parametrize("sampler", ["KSampler", "DDIM", "DDIM of core"])
def test_as_diffusers(server: ComfyServer, bases: Bases, portrait: Portrait, kind: str, sampler: str) -> None:
    """With the strengths at 0, MODEL from either loader: KSampler (euler, simple), our DDIM, and the one for VOID."""
    graph = switched_off(native_graph(server, kind, portrait("person_b_2")))
    noise = noise_of(kind)
    if sampler == "KSampler":
        graph, noise = with_ksampler(graph), ksamplers_noise(kind)
    elif sampler == "DDIM of core":
        graph["12"]["inputs"]["sampler"] = ["15", 0]
        graph["15"] = {"class_type": "VOIDSampler", "inputs": {}}
    error = difference(sampled(server, graph), by_diffusers(bases[kind][0], noise))
    print(f"{kind}, {sampler}: relative error {error:.1e}")
    assert error < 1e-3


@pytest.mark.parametrize("kind", ["1.0", "2b"])
def test_bypassed_is_the_same_base(server: ComfyServer, bases: Bases, portrait: Portrait, kind: str) -> None:
    graph = native_graph(server, kind, portrait("person_b_2"))
    off, bypassed = sampled(server, switched_off(graph)), sampled(server, plain(graph))
    assert torch.equal(off, bypassed)


@pytest.mark.parametrize(
    ("scheduler", "sampler"), [("sgm_uniform", "dpmpp_2m"), ("normal", "heun"), ("beta", "uni_pc")]
)
def test_other_samplers_make_a_clip(
    server: ComfyServer, bases: Bases, portrait: Portrait, scheduler: str, sampler: str
) -> None:
    """With many steps every sampler comes near the clip of the one that the model was trained for."""
    graph = plain(native_graph(server, "1.0", portrait("person_b_2")))
    clips = [
        sampled(server, with_ksampler(graph, steps=40, sampler_name=name, scheduler=schedule, cfg=1.0))
        for name, schedule in (("euler", "simple"), (sampler, scheduler))
    ]
    print(f"{sampler}, {scheduler}: {difference(clips[1], clips[0]):.2f}")
    assert difference(clips[1], clips[0]) < 0.2


@pytest.mark.parametrize("sampler", ["DDIM", "KSampler"])
def test_latents_that_are_not_finite_are_told(
    server: ComfyServer, bases: Bases, portrait: Portrait, sampler: str
) -> None:
    """By the step, with a remedy, and no black clip."""
    spoiled = bases["1.5"][0].folder.with_name(f"small-spoiled-{sampler}")
    shutil.copytree(bases["1.5"][0].folder, spoiled)
    (path,) = FolderBase(spoiled).transformer_files
    weights = load_file(path)
    weights["proj_out.weight"][0, 0] = float("inf")
    save_file(weights, path, metadata={"format": "pt"})
    graph = plain(native_graph(server, "1.5", portrait("person_b_2")))
    graph["1"]["inputs"]["base_model"] = spoiled.name
    graph = with_ksampler(graph) if sampler == "KSampler" else graph
    with pytest.raises(ExecutionFailed, match=rf"After step 1 of {STEPS} the latents are not finite .* in fp32\."):
        sampled(server, graph)
