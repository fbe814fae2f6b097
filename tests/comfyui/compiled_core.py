# ruff: noqa: E402, core reads the command line as it is imported
"""Run by test_compiled.py with core on the path: prints how many graphs core's transformer has, with the adapter and
without, after each of six clips: two people with guidance, without, and with it again."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

sys.argv = ["main.py", "--cpu", "--use-pytorch-cross-attention"]  # core's attention for CPUs reads /proc in the graph
import comfy.options

comfy.options.enable_args_parsing()

import comfy.ldm.cogvideo.model as core
import comfy.ops
import torch
from tiny_models import TRANSFORMERS, build_adapter, build_transformer, fill_with_noise, noise
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

PACK = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("pack", PACK / "__init__.py", submodule_search_locations=[str(PACK)])
sys.modules["pack"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["pack"])
native_model = importlib.import_module("pack.nodes.native_model")
runtime_memory = importlib.import_module("pack.nodes.runtime_memory")
Place = importlib.import_module("pack.mm_core.hosts.cogvideox_comfyui").Place


def graphs(*, adapted: bool, whole: bool) -> list[int]:
    torch._dynamo.reset()
    transformer = core.CogVideoXTransformer3DModel(
        **TRANSFORMERS["5b"], dtype=torch.float32, operations=comfy.ops.disable_weight_init
    )
    fill_with_noise(transformer).requires_grad_(False)
    adapter = build_adapter(build_transformer("5b")).requires_grad_(False)
    runtime_memory.with_cores_layers(adapter, casting=True)
    host = native_model.host()
    if adapted:
        for position, layer in enumerate(adapter.config.adapted_layers):
            block, ours = transformer.blocks[layer], adapter.blocks[str(layer)]
            place = Place(torch.tensor([position]))
            block.forward = host.adapted_forward(block, ours, place, block.forward, "state")
    backend, counts = CompileCounterWithBackend("eager"), []
    for module in [transformer] if whole else transformer.blocks:
        module.compile(backend=backend)
    for batch in (2, 1, 2):
        for seed in (1, 2):
            for timestep in (900.0, 100.0):
                person = dict(id_embedding=noise(1, 9, seed=seed), face_tokens=noise(1, 3, 32, seed=seed))
                state = host.face_state(transformer, adapter, **person, timestep=torch.tensor([timestep]))
                options = {"state": state} if adapted else {}
                times = torch.full((batch,), timestep)
                transformer(noise(batch, 4, 4, 4, 6), times, noise(batch, 7, 14), transformer_options=options)
            counts.append(backend.frame_count)
    return counts


with torch.no_grad():
    found = {
        f"{'adapted' if adapted else 'base'}, {'whole' if whole else 'blocks'}": graphs(adapted=adapted, whole=whole)
        for adapted in (True, False)
        for whole in (True, False)
    }
print(json.dumps({"graphs": found, "breaks": sum(counters["graph_break"].values())}))
