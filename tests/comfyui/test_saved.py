"""Workflows that the first release saved, as an API client sends them: they load and run as they did."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from comfy_server import ComfyServer

SAVED = sorted((Path(__file__).parent / "saved_0_1").glob("*.json"))


@pytest.mark.parametrize("name", ["text_to_video_tiny", "native"])
def test_it_runs(server: ComfyServer, portrait: Callable[[str], Path], name: str) -> None:
    workflow = json.loads((SAVED[0].parent / f"{name}.json").read_text(encoding="utf-8"))
    for node in workflow.values():
        if node["class_type"] == "LoadImage":
            node["inputs"]["image"] = server.upload_image(portrait("person_b_2"))
        if "steps" in node["inputs"]:
            node["inputs"]["steps"] = 2
    outputs = server.run(workflow)["outputs"]
    assert any(file["filename"].endswith(".mp4") for out in outputs.values() for file in out.get("images", []))


@pytest.mark.parametrize("path", SAVED, ids=lambda path: path.stem)
def test_its_nodes_and_inputs_are_there(server: ComfyServer, path: Path) -> None:
    """And every input that must be given was."""
    info = server.object_info()
    for node in json.loads(path.read_text(encoding="utf-8")).values():
        inputs = info[node["class_type"]]["input"]
        assert node["inputs"].keys() <= inputs["required"].keys() | inputs.get("optional", {}).keys()
        assert inputs["required"].keys() <= node["inputs"].keys()
