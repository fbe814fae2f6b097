"""Both routes inside a ComfyUI that computes on the simulated accelerator, as it is, in the place of an NPU: the CPU's
clips, little traffic, its own flags, and memory that it knows of and that does not grow."""

from __future__ import annotations

import copy
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from comfy_server import ComfyServer
from native_graphs import ADAPTER, ID_ENCODER, native_graph, plain, sampled, save_bases
from safetensors.torch import load_file
from torch import Tensor

from mm_core.pipelines.base import FolderBase

HERE = Path(__file__).resolve().parent
SAMPLER, LOADER = "MagicMirrorCogVideoXSampler", "MagicMirrorLoader"
RESERVED = int(1.2 * 2**30)
"""Bytes that core leaves free for computing, and for others."""

Start = Callable[..., Any]


@pytest.fixture(scope="module")
def start(
    comfyui_path: Path, repository: Path, insightface_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> Start:
    """Starts a ComfyUI of its own, on the accelerator, with flags."""
    pytest.importorskip("accelerator")

    @contextmanager
    def starting(*flags: str) -> Iterator[ComfyServer]:
        base = tmp_path_factory.mktemp("accelerated")
        (base / "custom_nodes").mkdir()
        shutil.copy(HERE / "device_probe.py", base / "custom_nodes")
        server = ComfyServer(
            comfyui_path, Path(sys.executable), base, repository,
            extra_args=flags, insightface_root=insightface_root, cpu=False,
        )  # fmt: skip
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", str(HERE / "npu"))
            server.__enter__()
        try:
            save_bases(base / "models")
            yield server
        finally:
            server.__exit__(None, None, None)

    return starting


@pytest.fixture(scope="module")
def accelerated(start: Start) -> Iterator[ComfyServer]:
    """In the CPU's precision; core's own choice for the device is bf16. What it keeps of nodes does not depend on the
    machine's free memory."""
    with start("--force-fp32", "--cache-lru", "200") as running:
        yield running


def told(server: ComfyServer, graph: dict[str, Any], latents: list[Any], room: int = 0) -> dict[str, Any]:
    """What the probe tells after a run, and the latents."""
    graph = graph | {
        "90": {"class_type": "DeviceProbe", "inputs": {"after": latents, "room": room}},
        "91": {"class_type": "SaveLatent", "inputs": {"samples": latents, "filename_prefix": "told"}},
    }
    outputs = server.run(graph)["outputs"]
    (file,) = outputs["91"]["latents"]
    saved = server.base / "output" / file["subfolder"] / file["filename"]
    return json.loads(outputs["90"]["text"][0]) | {"latents": load_file(saved)["latent_tensor"]}


def per_step(server: ComfyServer, graph: dict[str, Any]) -> np.ndarray:
    """Copies to the device, to the host and values read by a step, with everything loaded before."""
    found = []
    for steps in (3, 5, 9):  # not those of clips that ComfyUI has kept
        graph = copy.deepcopy(graph)
        graph["8"]["inputs"]["steps"] = steps
        found.append(np.array(told(server, graph, ["12", 0])["traffic"]))
    return (found[2] - found[1]) / 4


def test_native(
    accelerated: ComfyServer,
    server: ComfyServer,
    bases: dict[str, tuple[FolderBase, Path]],
    portrait: Callable[[str], Path],
) -> None:
    """Two people's clips are the CPU's; a step with identity copies its factors once, and reads which noise level it
    has."""
    for person in ("person_b_2", "person_a_2"):
        graph = native_graph(accelerated, "1.0", portrait(person))
        found = sampled(accelerated, graph)
        expected = sampled(server, native_graph(server, "1.0", portrait(person)))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    more = per_step(accelerated, graph) - per_step(accelerated, plain(graph))
    assert (more <= np.array([1, 0, 1])).all()


def test_diffusers(
    accelerated: ComfyServer, server: ComfyServer, make_graph: Callable[..., Any], run: Callable[..., np.ndarray]
) -> None:
    clips = []
    for running in (accelerated, server):
        graph = make_graph(running)
        graph.inputs(LOADER)["precision"] = "fp32"
        clips.append(run(running, graph))
    assert np.abs(clips[0].astype(int) - clips[1]).max() <= 1


def own_graph(make_graph: Callable[..., Any], server: ComfyServer, kind: str) -> Any:
    """This pack's sampler on one of the small models."""
    graph = make_graph(server)
    del graph[graph.id("MagicMirrorVideoCombine")]
    graph.inputs(LOADER).update(base_model=f"small-{kind}", adapter=ADAPTER.format(kind), id_encoder=ID_ENCODER)
    return again(graph, graph.inputs(SAMPLER))


def again(graph: Any, inputs: dict[str, Any], steps: dict[str, Any] | None = None) -> Any:
    """The graph in one step, with the sampler whose inputs these are run each time."""
    graph["92"] = {"class_type": "Again", "inputs": {"value": inputs["model"]}}
    inputs["model"] = ["92", 0]
    (steps or inputs)["steps"] = 1
    return graph


def loads(server: ComfyServer) -> np.ndarray:
    """How many T5s have been read, and parts brought to where they compute."""
    return np.array([server.log_text().count(line) for line in ("reads the text encoder", "Requested to load")])


def test_twenty_clips(
    accelerated: ComfyServer, make_graph: Callable[..., Any], portrait: Callable[[str], Path]
) -> None:
    """Another prompt, person, precision or seed: a seed loads nothing, nor does what was seen before, a prompt of T5
    too, and the second ten leave device and process as the first ten have."""
    graph = own_graph(make_graph, accelerated, "1.0")
    sampler, loader, photo = graph.inputs(SAMPLER), graph.inputs(LOADER), graph.inputs("LoadImage")
    people = [photo["image"], accelerated.upload_image(portrait("person_a_2"))]
    rounds: list[list[dict[str, Any]]] = []
    for _ in range(2):
        rounds.append([])
        for number in range(10):
            sampler["prompt"] = f"A {('woman', 'man')[number // 2 % 2]} img smiles."
            photo["image"], loader["precision"] = people[number // 3 % 2], ("fp32", "bf16")[number // 5]
            sampler["seed"] += 1
            seen = loads(accelerated)
            found = told(accelerated, graph, [graph.id(SAMPLER), 1])
            rounds[-1].append(found | {"loads": loads(accelerated) - seen})
    first, second = rounds
    print(*([(*found["loads"].tolist(), found["live"], found["process"]) for found in ten] for ten in rounds))
    assert not first[1]["loads"].any() and not first[7]["loads"].any()  # another seed, and nothing else
    assert [found["loads"][0] for found in first[1:]] == [0, 0, 0, 0, 1, 0, 0, 0, 0]  # a T5 of the other type
    assert not any(found["loads"].any() for found in second)
    assert {found["live"] for found in second} == {first[-1]["live"]}
    # Half a model; ComfyUI keeps the clips themselves, and the process's goes up and down by some 50 MB.
    highest = [max(found["process"] for found in ten) for ten in rounds]
    assert highest[1] - highest[0] < first[0]["live"] / 2


def test_two_workflows_take_turns(
    accelerated: ComfyServer, make_graph: Callable[..., Any], portrait: Callable[[str], Path]
) -> None:
    """Ten clips of ours, on both routes, each followed by one of a core checkpoint of the same size, where only one has
    room: each evicts what it must, every clip is the first one of its kind, and nothing grows."""
    own = own_graph(make_graph, accelerated, "1.0 by core")
    native, core = (native_graph(accelerated, f"{kind} by core", portrait("person_b_2")) for kind in ("1.0", "2b"))
    core = plain(core)
    for graph in (native, core):
        again(graph, graph["7"]["inputs"], graph["8"]["inputs"])
        del graph["13"]
    workflows = {"own": (own, [own.id(SAMPLER), 1]), "native": (native, ["12", 0]), "core": (core, ["12", 0])}
    accelerated.free()  # of what the tests before have loaded
    room, rounds = 40_000_000, []
    latents: dict[str, Tensor] = {}
    for _ in range(5):
        rounds.append([])
        for name in ("own", "core", "native", "core"):
            found = told(accelerated, *workflows[name], room=RESERVED + room)
            assert torch.equal(latents.setdefault(name, found["latents"]), found["latents"]), name
            rounds[-1].append(found)
    for turn in zip(*rounds[1:]):  # from the second round on what is left of the others is there
        each = [[(name, size) for name, size, device, _ in found["models"] if device == "npu"] for found in turn]
        assert each == [each[-1]] * 4
        there, loaded = dict(each[-1]), sum(size for _, size in each[-1])
        assert {found["live"] for found in turn} == {loaded} and loaded < 1.3 * room
        grown = turn[-1]["process"] - turn[0]["process"]
        print(there, [found["live"] for found in turn], f"the process has grown by {grown}")
        assert grown < there.get("CogVideoX", there.get("CogVideoXTransformer3DModel"))


def test_flags(start: Start, make_graph: Callable[..., Any], portrait: Callable[[str], Path]) -> None:
    """ComfyUI's own decide for both routes: what rests in main memory, where each part computes, and in which type."""
    with start("--novram", "--bf16-unet", "--cpu-vae", "--fp16-text-enc") as running:
        own = own_graph(make_graph, running, "1.0")
        found = told(running, own, [own.id(SAMPLER), 1])
        there = {name: rest for name, *rest in found["models"]}
        assert there["CogVideoXTransformer3DModel"] == [0, "npu", "torch.bfloat16"]
        assert there["AutoencoderKLCogVideoX"][1:] == ["cpu", "torch.float32"]
        assert there["T5Stack"][1:] == ["cpu", "torch.float16"]
        assert found["latents"].isfinite().all() and found["latents"].std() > 0.1
        native = native_graph(running, "1.0", portrait("person_b_2"))
        native["1"]["inputs"].update(precision="auto", offload="auto")
        there = {name: rest for name, *rest in told(running, native, ["12", 0])["models"]}
        assert there["CogVideoX"] == there["FaceAttention"] == [0, "npu", "torch.bfloat16"]
        assert there["T5Stack"][1:] == ["cpu", "torch.float16"]
