"""What stays in memory between runs, and what happens when there is too little of it; on both ends of ComfyUI."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_server import ComfyServer, ExecutionFailed, ExecutionInterrupted
from environment import NEW_COMFYUI
from safetensors import safe_open
from safetensors.torch import load_file

SAMPLER, LOADER = "MagicMirrorCogVideoXSampler", "MagicMirrorLoader"
PROBE = Path(__file__).resolve().parent / "memory_probe.py"
NATIVE = Path(__file__).resolve().parents[2] / "workflows" / "api" / "native.json"


@pytest.fixture(scope="module", params=["comfyui_path", "old_comfyui_path"])
def probed(
    request: pytest.FixtureRequest, repository: Path, insightface_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ComfyServer]:
    """A ComfyUI of its own, with the probe."""
    comfyui, base = request.getfixturevalue(request.param), tmp_path_factory.mktemp("probed")
    (base / "custom_nodes").mkdir()
    shutil.copy(PROBE, base / "custom_nodes")
    with ComfyServer(comfyui, Path(sys.executable), base, repository, insightface_root=insightface_root) as running:
        yield running


@pytest.fixture
def graph(probed: ComfyServer, make_graph: Callable[..., Any]) -> Any:
    graph = make_graph(probed)
    graph.inputs(SAMPLER)["steps"] = 1
    graph.add("90", "MemoryProbe", model=[graph.id(LOADER), 0], after=[graph.id(SAMPLER), 0])
    return graph


def probe(server: ComfyServer, graph: Any) -> tuple[str, int, int]:
    """The model's identity, the models with loaded weights, the transformers in memory."""
    model, loaded, transformers = server.run(graph)["outputs"]["90"]["text"]
    return model, int(loaded), int(transformers)


def test_runs_share_one_model(probed: ComfyServer, graph: Any, make_graph: Callable[..., Any]) -> None:
    """Another seed, person or strength does not load the weights again."""
    first, loaded, transformers = probe(probed, graph)
    assert (loaded, transformers) == (1, 1)
    graph.inputs(SAMPLER)["seed"] += 1
    assert probe(probed, graph) == (first, 1, 1)
    graph.inputs("LoadImage")["image"] = make_graph(probed, "person_a_2").inputs("LoadImage")["image"]
    graph.inputs("MagicMirrorApplyCANAdapter")["can_scale"] = 0.5
    assert probe(probed, graph) == (first, 1, 1)


def test_a_replaced_model_can_be_freed(probed: ComfyServer, graph: Any) -> None:
    """ComfyUI 0.30 keeps the outputs of earlier workflows while there is memory; its button takes their weights too."""
    first, *_ = probe(probed, graph)
    graph.inputs(LOADER)["precision"] = "bf16"
    assert probe(probed, graph)[0] != first
    probed.free()
    assert probe(probed, graph)[1:] == (1, 1)


def test_the_loaders_other_inputs_keep_the_model(probed: ComfyServer, graph: Any) -> None:
    """Old ComfyUI drops the loader's output before it asks for the new one; there it is at least not kept twice."""
    first, *_ = probe(probed, graph)
    graph.inputs(LOADER)["allow_download"] = True
    second, *counts = probe(probed, graph)
    assert counts == [1, 1]
    assert second == first or NEW_COMFYUI not in str(probed.comfyui)


@pytest.mark.parametrize("bug", ["", "a bug"])
def test_a_failed_decode_keeps_the_clip(probed: ComfyServer, graph: Any, bug: str) -> None:
    """Whatever failed: the latents are in a file that core's Load Latent reads, with the workflow; the next run works.
    """
    del graph["90"]
    graph.inputs(SAMPLER)["seed"] = 1234 + len(bug)
    switch = probed.base / "input" / "out_of_memory"
    switch.write_text(bug)
    try:
        with pytest.raises(ExecutionFailed, match="memory is left" if bug else "not enough memory to decode") as raised:
            probed.run(graph)
    finally:
        switch.unlink()
    rescued = probed.base / "output" / "latents" / f"magic_mirror_0000{2 if bug else 1}_.latent"
    assert str(rescued) in str(raised.value)
    with safe_open(rescued, "pt") as content:
        assert graph.id(SAMPLER) in content.metadata()["prompt"]

    shutil.copy(rescued, probed.base / "input" / "rescued.latent")
    graph.add("91", "LoadLatent", latent="rescued.latent")
    graph.add("92", "SaveLatent", samples=["91", 0], filename_prefix="rescued")
    graph.add("93", "SaveLatent", samples=[graph.id(SAMPLER), 1], filename_prefix="sampled")
    outputs = probed.run(graph)["outputs"]
    files = [probed.base / "output" / outputs[key]["latents"][0]["filename"] for key in ("92", "93")]
    read, sampled = (load_file(file)["latent_tensor"] for file in files)
    torch.testing.assert_close(read, sampled)


def test_a_cancel_while_decoding_loses_nothing(probed: ComfyServer, graph: Any) -> None:
    """On both routes it acts at once, no file is written that nobody asked for, and the next run only decodes."""
    graph.inputs(SAMPLER)["seed"] = 99
    workflows = {SAMPLER: graph}
    if NEW_COMFYUI in str(probed.comfyui):  # the old one has no CogVideoX of its own
        workflows["MagicMirrorDecode"] = type(graph)(json.loads(NATIVE.read_text(encoding="utf-8")))
        workflows["MagicMirrorDecode"].inputs("MagicMirrorNativeSampling")["steps"] = 1
    switch = probed.base / "input" / "out_of_memory"
    for decoding, workflow in workflows.items():
        before = sorted((probed.base / "output").rglob("*"))
        switch.write_text("cancel")
        try:
            with pytest.raises(ExecutionInterrupted, match=decoding):
                probed.run(workflow)
        finally:
            switch.unlink()
        assert sorted((probed.base / "output").rglob("*")) == before
        sampled = probed.log_text().count("a clip is sampled")
        again = probed.run(workflow)
        assert probed.log_text().count("a clip is sampled") == sampled
        assert decoding == SAMPLER or workflow.id("SamplerCustomAdvanced") in probed.cached_nodes(again)
