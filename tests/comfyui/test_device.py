"""Both routes inside a ComfyUI that computes on the simulated accelerator: the CPU's clips, and little traffic."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from comfy_server import ComfyServer
from native_graphs import native_graph, plain, sampled, save_bases

from mm_core.pipelines.base import FolderBase

PROBE = Path(__file__).resolve().parent / "accelerator_probe.py"


@pytest.fixture(scope="module")
def accelerated(
    comfyui_path: Path, repository: Path, insightface_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ComfyServer]:
    """A ComfyUI of its own whose device is the simulated one."""
    pytest.importorskip("accelerator")
    base = tmp_path_factory.mktemp("accelerated")
    (base / "custom_nodes").mkdir()
    probe = PROBE.read_text(encoding="utf-8").replace('"TESTS"', repr(str(PROBE.parents[1])))
    (base / "custom_nodes" / PROBE.name).write_text(probe, encoding="utf-8")
    python = Path(sys.executable)
    with ComfyServer(comfyui_path, python, base, repository, insightface_root=insightface_root) as running:
        save_bases(base / "models")
        yield running


def traffic(server: ComfyServer, graph: dict[str, Any], steps: int) -> np.ndarray:
    """Copies to the device, to the host and values read by a run, with everything loaded before."""
    graph = copy.deepcopy(graph)
    graph["8"]["inputs"]["steps"] = steps
    graph["13"] = {"class_type": "TrafficProbe", "inputs": {"after": ["12", 0]}}
    return np.array([int(count) for count in server.run(graph)["outputs"]["13"]["text"]])


def per_step(server: ComfyServer, graph: dict[str, Any]) -> np.ndarray:
    traffic(server, graph, 3)
    return (traffic(server, graph, 8) - traffic(server, graph, 4)) / 4


@pytest.mark.parametrize("kind", ["1.0", "1.5"])
def test_native(
    accelerated: ComfyServer,
    server: ComfyServer,
    bases: dict[str, tuple[FolderBase, Path]],
    portrait: Callable[[str], Path],
    kind: str,
) -> None:
    """Two people's clips are the CPU's; a step with identity copies its factors once, and reads which noise level it
    has."""
    for person in ("person_b_2", "person_a_2"):
        graph = native_graph(accelerated, kind, portrait(person))
        found = sampled(accelerated, graph)
        expected = sampled(server, native_graph(server, kind, portrait(person)))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    more = per_step(accelerated, graph) - per_step(accelerated, plain(graph))
    assert (more <= np.array([1, 0, 1])).all()


def test_diffusers(
    accelerated: ComfyServer, server: ComfyServer, make_graph: Callable[..., Any], run: Callable[..., np.ndarray]
) -> None:
    clips = []
    for running in (accelerated, server):
        graph = make_graph(running)
        graph.inputs("MagicMirrorLoader")["precision"] = "fp32"
        clips.append(run(running, graph))
    assert np.abs(clips[0].astype(int) - clips[1]).max() <= 1
