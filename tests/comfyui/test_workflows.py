"""Every shipped workflow in API format, posted as it is: on the tiny model each ends in a video or an image."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from comfy_server import ComfyServer

FOLDER = Path(__file__).resolve().parents[2] / "workflows"
CANVAS = sorted(FOLDER.glob("*.json"))
OF_TINY = [path for path in CANVAS if "5b" not in path.stem]


def test_every_workflow_has_a_twin_and_a_picture() -> None:
    assert CANVAS
    for path in CANVAS:
        assert (FOLDER / "api" / path.name).is_file(), path.name
        assert path.with_suffix(".jpg").is_file(), path.name


def test_all_are_in_the_template_browser(server: ComfyServer) -> None:
    listed = server.get("/workflow_templates")
    (ours,) = (names for names in listed.values() if CANVAS[0].stem in names)
    assert sorted(ours) == [path.stem for path in CANVAS]


@pytest.mark.parametrize("path", OF_TINY, ids=lambda path: path.stem)
def test_it_runs(server: ComfyServer, path: Path) -> None:
    workflow = json.loads((FOLDER / "api" / path.name).read_text(encoding="utf-8"))
    for node in workflow.values():
        if "steps" in node["inputs"]:
            node["inputs"]["steps"] = 2
    outputs = server.run(workflow)["outputs"]
    saved = [file["filename"] for output in outputs.values() for file in output.get("images", [])]
    ending = ".png" if path.stem == "portrait" else ".mp4"
    assert any(name.endswith(ending) and name.startswith(_prefix(workflow)) for name in saved), saved


def _prefix(workflow: dict[str, Any]) -> str:
    (prefix,) = (n["inputs"]["filename_prefix"] for n in workflow.values() if "filename_prefix" in n["inputs"])
    return prefix.rsplit("/", 1)[-1]
