"""The shipped workflows: the graph for the canvas and its twin for the API are the same graph."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "workflows"
WORKFLOWS = sorted(path.stem for path in FOLDER.glob("*.json"))
NOTES = ("Note", "MarkdownNote")
# Values in `widgets_values` of the canvas that are no inputs: what LoadImage's button and a seed's control hold.
SEED = (["randomize"], ["fixed"])
NOT_INPUTS = {
    "LoadImage": (["image"],), "MagicMirrorCogVideoXSampler": SEED, "MagicMirrorShots": SEED, "RandomNoise": SEED,
}  # fmt: skip


def canvas(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def api(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / "api" / f"{name}.json").read_text(encoding="utf-8"))


def as_api(workflow: dict[str, Any]) -> dict[str, Any]:
    """The canvas' graph as the page would send it."""
    sources = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    nodes = {}
    for node in workflow["nodes"]:
        if node["type"] in NOTES:
            continue
        links = {entry["name"]: sources[entry["link"]] for entry in node["inputs"] if entry["link"] is not None}
        names = [entry["name"] for entry in node["inputs"] if "widget" in entry]
        assert node["widgets_values"][len(names) :] in NOT_INPUTS.get(node["type"], ([],))
        widgets = dict(zip(names, node["widgets_values"], strict=False))
        nodes[str(node["id"])] = {"class_type": node["type"], "inputs": widgets | links}
    return nodes


@pytest.mark.parametrize("name", WORKFLOWS)
def test_twins_are_one_graph(name: str) -> None:
    twin = {key: {part: node[part] for part in ("class_type", "inputs")} for key, node in api(name).items()}
    assert as_api(canvas(name)) == twin


@pytest.mark.parametrize("name", WORKFLOWS)
def test_links_agree_with_their_ends(name: str) -> None:
    workflow = canvas(name)
    nodes = {node["id"]: node for node in workflow["nodes"]}
    for link, source, output, target, slot, kind in workflow["links"]:
        assert link in nodes[source]["outputs"][output]["links"]
        assert nodes[source]["outputs"][output]["type"] == kind
        assert nodes[target]["inputs"][slot]["link"] == link
        assert nodes[target]["inputs"][slot]["type"] == kind
    used = {link[0] for link in workflow["links"]}
    assert {link for node in nodes.values() for out in node["outputs"] for link in out["links"] or []} == used


@pytest.mark.parametrize("name", WORKFLOWS)
def test_nodes_do_not_overlap(name: str) -> None:
    title = 40  # pixels above a node's position
    boxes = [(*node["pos"], *node["size"]) for node in canvas(name)["nodes"]]
    for index, (x, y, width, height) in enumerate(boxes):
        for other_x, other_y, other_width, other_height in boxes[index + 1 :]:
            beside = x + width <= other_x or other_x + other_width <= x
            above = y + height <= other_y - title or other_y + other_height <= y - title
            assert beside or above


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_note_says_what_to_change(name: str) -> None:
    (note,) = (node for node in canvas(name)["nodes"] if node["type"] in NOTES)
    assert "Change first" in note["widgets_values"][0]


def test_missing_models_can_be_offered() -> None:
    """ComfyUI's page offers a download for a widget's file that is named in the node's `models`."""
    (loader,) = (node for node in canvas("text_to_video_5b")["nodes"] if node["type"] == "MagicMirrorLoader")
    for model in loader["properties"]["models"]:
        assert model.keys() >= {"name", "url", "directory"}
        assert model["name"] in loader["widgets_values"] and model["url"].endswith(model["name"])
