"""LoRAs on a real ComfyUI: every naming the same on both routes, stacked, taken off, refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from comfy_server import ComfyServer, ExecutionFailed
from lora_files import NAMINGS, write_loras
from native_graphs import ADAPTER, GUIDANCE, PROMPT, SEED, STEPS, native_graph, sampled, transformer_config
from torch import Tensor

from mm_core.pipelines.tiny import TRANSFORMER

Portrait = Callable[[str], Path]
LAYERS = "57 layers"
OTHER = "another model.safetensors"


def put_loras(server: ComfyServer, made: Path) -> None:
    """`<naming>/<file as its trainer names it>` below models/loras."""
    files = write_loras(made / "loras", TRANSFORMER)
    other = write_loras(made / "other", transformer_config("1.0 by core") | dict(num_attention_heads=2))
    folder = server.base / "models" / "loras"
    for naming, path in files.items():
        shutil.copytree(path.parent, folder / naming)
    shutil.copy(other["kohya"], folder / OTHER)


def name_of(server: ComfyServer, naming: str) -> str:
    (path,) = (server.base / "models" / "loras" / naming).glob("*.safetensors")
    return f"{naming}/{path.name}"


@pytest.fixture(scope="module")
def with_loras(server: ComfyServer, bases: object, tmp_path_factory: pytest.TempPathFactory) -> ComfyServer:
    put_loras(server, tmp_path_factory.mktemp("loras"))
    return server


def routes(server: ComfyServer, photo: Path) -> dict[str, dict[str, Any]]:
    """The same clip of the same person on both routes; node 5 puts the identity on the model."""
    native = native_graph(server, "1.0", photo)
    ours = {key: native[key] for key in ("1", "2", "3")}
    strengths = {key: value for key, value in native["5"]["inputs"].items() if key.endswith(("_scale", "_percent"))}
    sampler = dict(
        model=["5", 0], prompt=PROMPT, negative_prompt="", width=64, height=64, num_frames=9, steps=STEPS,
        guidance_scale=GUIDANCE, dynamic_guidance=False, scheduler="ddim", seed=SEED,
    )  # fmt: skip
    ours |= {
        "5": {
            "class_type": "MagicMirrorApplyCANAdapter",
            "inputs": dict(model=["1", 0], identity=["3", 0], **strengths),
        },
        "12": {"class_type": "MagicMirrorCogVideoXSampler", "inputs": sampler},
        "13": {"class_type": "SaveLatent", "inputs": dict(samples=["12", 1], filename_prefix="ours")},
    }
    assert ours["1"]["inputs"]["adapter"] == ADAPTER.format("1.0")
    return {"ours": ours, "native": native}


def with_lora(graph: dict[str, Any], *loras: tuple[str, float]) -> dict[str, Any]:
    """LoRA nodes in a row in front of the node that puts the identity on."""
    graph = {key: {"class_type": node["class_type"], "inputs": dict(node["inputs"])} for key, node in graph.items()}
    for number, (name, strength) in enumerate(loras):
        inputs = dict(model=graph["5"]["inputs"]["model"], lora_name=name, strength=strength)
        graph[f"lora{number}"] = {"class_type": "MagicMirrorLoRA", "inputs": inputs}
        graph["5"]["inputs"]["model"] = [f"lora{number}", 0]
    return graph


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.fixture(scope="module")
def plain(with_loras: ComfyServer, portrait: Portrait) -> dict[str, Tensor]:
    """The clip without a LoRA, by route."""
    graphs = routes(with_loras, portrait("person_b_2"))
    return {route: sampled(with_loras, graph) for route, graph in graphs.items()}


@pytest.mark.parametrize("naming", NAMINGS)
def test_namings(with_loras: ComfyServer, portrait: Portrait, plain: dict[str, Tensor], naming: str) -> None:
    """The same change of the clip on both routes; the next clip has nothing of it."""
    found = {}
    for route, graph in routes(with_loras, portrait("person_b_2")).items():
        graph["13"]["inputs"]["filename_prefix"] = f"{route} {NAMINGS.index(naming)}"  # nothing is taken from the cache
        found[route] = sampled(with_loras, with_lora(graph, (name_of(with_loras, naming), 0.5)))
        assert torch.equal(sampled(with_loras, graph), plain[route])
    change, between = difference(found["ours"], plain["ours"]), difference(found["native"], found["ours"])
    without = difference(plain["native"], plain["ours"])
    print(f"{naming}: change {change:.2f}; between the routes {between:.1e}, without a LoRA {without:.1e}")
    assert change > 0.1
    assert between < 1e-3


def test_in_a_row(with_loras: ComfyServer, portrait: Portrait, plain: dict[str, Tensor]) -> None:
    """Strengths add up, and the one that takes away leaves the clip as it was."""
    name = name_of(with_loras, "kohya")
    for route, graph in routes(with_loras, portrait("person_b_2")).items():
        whole = sampled(with_loras, with_lora(graph, (name, 1.0)))
        halves = sampled(with_loras, with_lora(graph, (name, 0.25), (name, 0.75)))
        assert difference(halves, whole) < 1e-4
        assert difference(sampled(with_loras, with_lora(graph, (name, 1.0), (name, -1.0))), plain[route]) < 1e-4
        assert torch.equal(sampled(with_loras, with_lora(graph, (name, 0.0))), plain[route])


def test_the_loaders_lora_goes_along(with_loras: ComfyServer, portrait: Portrait) -> None:
    """A LoRA between Load MagicMirror and the native MODEL acts as one on the MODEL; nothing is made again for a name
    that comes from another node."""
    graph = routes(with_loras, portrait("person_b_2"))["native"]
    name = name_of(with_loras, "peft")
    behind = sampled(with_loras, with_lora(graph, (name, 0.8)))
    graph["lora"] = {"class_type": "MagicMirrorLoRA", "inputs": dict(model=["1", 0], lora_name=name, strength=0.8)}
    graph["4"]["inputs"]["magic_mirror"] = ["lora", 0]
    graph["name"] = {"class_type": "PrimitiveString", "inputs": {"value": name}}
    switch = dict(switch=True, on_true=["name", 0], on_false=["name", 0])
    graph["switch"] = {"class_type": "ComfySwitchNode", "inputs": switch}
    graph["lora"]["inputs"]["lora_name"] = ["switch", 0]
    assert torch.equal(sampled(with_loras, graph), behind)
    assert with_loras.cached_nodes(with_loras.run(graph)) >= {"lora", "5"}


def test_another_models_lora_is_refused(with_loras: ComfyServer, portrait: Portrait) -> None:
    for graph in routes(with_loras, portrait("person_b_2")).values():
        with pytest.raises(ExecutionFailed, match="was made for another model: 57 of its 57 layers"):
            with_loras.run(with_lora(graph, (OTHER, 1.0)))


def test_on_every_comfyui(
    any_server: ComfyServer, any_graph: Any, run: Callable[..., np.ndarray], tmp_path: Path
) -> None:
    """tiny and a LoRA for it: said, seen, and gone."""
    if not (any_server.base / "models" / "loras" / OTHER).is_file():
        put_loras(any_server, tmp_path)
    before = run(any_server, any_graph)
    changed = any_graph.copy()
    apply = changed.inputs("MagicMirrorApplyCANAdapter")
    changed.add(
        "lora", "MagicMirrorLoRA", model=apply["model"], lora_name=name_of(any_server, "VideoX-Fun"), strength=1.0
    )
    said = {key: changed[key] for key in (changed.id("MagicMirrorLoader"), "lora")}
    said["said"] = {"class_type": "PreviewAny", "inputs": {"source": ["lora", 1]}}
    assert LAYERS in str(any_server.run(said)["outputs"]["said"])
    apply["model"] = ["lora", 0]
    assert (run(any_server, changed) != before).any()
    assert (run(any_server, any_graph) == before).all()
