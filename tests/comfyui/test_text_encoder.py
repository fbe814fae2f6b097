"""T5 in a ComfyUI that makes several clips: read from disk once, on both routes, and gone when memory is freed; in the
next process not even that, for a prompt that the one before has seen."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from comfy_server import ComfyServer

PROBE = Path(__file__).resolve().parent / "text_probe.py"
NATIVE = Path(__file__).resolve().parents[2] / "workflows" / "api" / "native.json"
PROMPTS = ("A man img smiles.", "A woman img turns left.")


@pytest.fixture(scope="module")
def probed(
    comfyui_path: Path, repository: Path, insightface_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ComfyServer]:
    """A ComfyUI of its own, which counts."""
    base = tmp_path_factory.mktemp("probed")
    (base / "custom_nodes").mkdir()
    shutil.copy(PROBE, base / "custom_nodes")
    python = Path(sys.executable)
    with ComfyServer(comfyui_path, python, base, repository, insightface_root=insightface_root) as running:
        yield running


@pytest.fixture
def own(probed: ComfyServer, make_graph: Callable[..., Any]) -> Any:
    """This pack's sampler."""
    graph = make_graph(probed)
    graph.inputs("MagicMirrorCogVideoXSampler")["steps"] = 1
    graph.add("90", "TextProbe", after=[graph.id("MagicMirrorCogVideoXSampler"), 0])
    return graph


@pytest.fixture
def native(own: Any) -> Any:
    """ComfyUI's own sampler, on the same loader."""
    graph = type(own)(json.loads(NATIVE.read_text(encoding="utf-8")))
    graph.inputs("MagicMirrorNativeSampling")["steps"] = 1
    graph.add("90", "TextProbe", after=[graph.id("MagicMirrorDecode"), 0])
    return graph


def clip(server: ComfyServer, graph: Any, prompt: str) -> tuple[int, int]:
    """How many T5s the process has read, and how often one has run, after a clip."""
    for node in graph.values():
        if "prompt" in node["inputs"]:
            node["inputs"]["prompt"] = prompt
    read, run = server.run(graph)["outputs"]["90"]["text"]
    return int(read), int(run)


def test_it_is_read_once_for_three_clips_of_two_prompts(probed: ComfyServer, own: Any, native: Any) -> None:
    """And no text is encoded twice."""
    assert clip(probed, native, PROMPTS[0]) == (1, 2)  # with the person's slots, and the negative one
    assert clip(probed, own, PROMPTS[0]) == (1, 3)  # this pack's sampler asks for the prompt without slots too
    assert clip(probed, native, PROMPTS[1]) == (1, 4)
    assert clip(probed, own, PROMPTS[1]) == (1, 5)
    assert probed.log_text().count("reads the text encoder") == 1


def test_it_leaves_when_memory_is_freed(probed: ComfyServer, own: Any) -> None:
    read, _ = clip(probed, own, PROMPTS[0])
    probed.free()
    assert clip(probed, own, PROMPTS[0])[0] == read  # its prompts are on disk
    assert clip(probed, own, "A boy img sings.")[0] == read + 1


def test_the_next_process_reads_none_for_the_same_prompt(probed: ComfyServer, own: Any) -> None:
    """In 4 bits neither has been made yet."""
    clip(probed, own, PROMPTS[0])
    probed.__exit__(None, None, None)
    probed.__enter__()
    assert clip(probed, own, PROMPTS[0]) == (0, 0)
    own.inputs("MagicMirrorLoader")["precision"] = "nf4"
    assert clip(probed, own, PROMPTS[0]) == (1, 3)
