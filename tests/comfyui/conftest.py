"""The tiny workflow on a real ComfyUI, and what comes out of it."""

from __future__ import annotations

import copy
import io
import json
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from comfy_server import ComfyClient, ComfyServer
from native_graphs import save_bases
from PIL import Image

from mm_core.pipelines.base import FolderBase

WORKFLOW = Path(__file__).resolve().parents[2] / "workflows" / "api" / "photo_to_video_tiny.json"


class Graph(dict[str, dict[str, Any]]):
    """A workflow in API format whose nodes are found by their type."""

    def id(self, class_type: str) -> str:
        (found,) = (key for key, node in self.items() if node["class_type"] == class_type)
        return found

    def inputs(self, class_type: str) -> dict[str, Any]:
        return self[self.id(class_type)]["inputs"]

    def add(self, key: str, class_type: str, **inputs: Any) -> None:
        self[key] = {"class_type": class_type, "inputs": inputs}

    def bypass_apply(self) -> None:
        """What the canvas sends when the Apply node is bypassed."""
        self.inputs("MagicMirrorCogVideoXSampler")["model"] = [self.id("MagicMirrorLoader"), 0]
        for unused in ("MagicMirrorApplyCANAdapter", "MagicMirrorExtractFaceEmbedding", "LoadImage"):
            del self[self.id(unused)]

    def copy(self) -> Graph:
        return copy.deepcopy(self)


@pytest.fixture(scope="session")
def portrait(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A portrait by its name, as a PNG: decoders of JPEG differ by a bit."""
    folder = tmp_path_factory.mktemp("portraits")

    def convert(name: str) -> Path:
        path = folder / f"{name}.png"
        if not path.is_file():
            Image.open(photographs / f"{name}.jpg").convert("RGB").save(path)
        return path

    return convert


@pytest.fixture(scope="session")
def make_graph(portrait: Callable[[str], Path]) -> Callable[..., Graph]:
    """The tiny workflow of a photo, with one that the server has in the example's place, in three steps."""

    def make(server: ComfyClient, photo: str = "person_b_2") -> Graph:
        graph = Graph(json.loads(WORKFLOW.read_text(encoding="utf-8")))
        graph.add(graph.id("MagicMirrorExamplePerson"), "LoadImage", image=server.upload_image(portrait(photo)))
        graph.inputs("MagicMirrorCogVideoXSampler").update(
            width=64, height=64, num_frames=9, steps=3, guidance_scale=3.0, dynamic_guidance=False, scheduler="ddim"
        )
        return graph

    return make


@pytest.fixture(scope="session")
def bases(server: ComfyServer) -> dict[str, tuple[FolderBase, Path]]:
    """Small models of `native_graphs.KINDS`, and their adapters, where the server finds them."""
    return save_bases(server.base / "models")


@pytest.fixture(scope="module", params=["server", "old_server"])
def any_server(request: pytest.FixtureRequest) -> ComfyServer:
    """Both supported ends of ComfyUI."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def any_graph(any_server: ComfyServer, make_graph: Callable[..., Graph]) -> Graph:
    return make_graph(any_server)


@pytest.fixture
def graph(server: ComfyServer, make_graph: Callable[..., Graph]) -> Graph:
    return make_graph(server)


def saved_file(entry: dict[str, Any], graph: Graph) -> dict[str, str]:
    """The file that the Video Combine node lists in a history record."""
    (file,) = entry["outputs"][graph.id("MagicMirrorVideoCombine")]["images"]
    return file


def read_frames(content: bytes) -> np.ndarray:
    """(F, H, W, 3) uint8 from a file of any of the four formats."""
    try:
        with av.open(io.BytesIO(content)) as container:
            return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    except av.error.InvalidDataError:  # FFmpeg reads no animated webp
        return np.stack(list(_pictures(content)))


def _pictures(content: bytes) -> Iterator[np.ndarray]:
    with Image.open(io.BytesIO(content)) as image:
        for index in range(image.n_frames):
            image.seek(index)
            yield np.array(image.convert("RGB"))


@pytest.fixture(scope="session")
def run() -> Callable[[ComfyClient, Graph], np.ndarray]:
    """Execute a graph; the frames of the file it saves, a webp: x264 encodes the same frames differently each time."""

    def execute(server: ComfyClient, graph: Graph) -> np.ndarray:
        graph.inputs("MagicMirrorVideoCombine").update(format="webp", quality=100)
        file = saved_file(server.run(graph), graph)
        return read_frames(server.view(**file))

    return execute


@pytest.fixture(scope="session")
def saved() -> Callable[[dict[str, Any], Graph], dict[str, str]]:
    return saved_file


@pytest.fixture(scope="session")
def decode() -> Callable[[bytes], np.ndarray]:
    return read_frames


@pytest.fixture(scope="session")
def queue() -> Callable[..., str]:
    """Post a workflow with what the page sends beside it; the prompt id."""

    def post(server: ComfyClient, graph: Graph, **beside: Any) -> str:
        body = json.dumps({"prompt": graph} | beside).encode()
        with urllib.request.urlopen(urllib.request.Request(server.address + "/prompt", data=body)) as answer:
            return json.load(answer)["prompt_id"]

    return post
