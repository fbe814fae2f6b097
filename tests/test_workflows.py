"""The shipped workflows: the graph for the canvas and its twin for the API are the same graph."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "workflows"
WORKFLOWS = sorted(path.stem for path in FOLDER.glob("*.json"))
BLUEPRINT = FOLDER.parent / "subgraphs" / "Face to video.json"
NOTES = ("Note", "MarkdownNote")
MODEL_FILES = (".safetensors", ".sft", ".bin", ".ckpt", ".pt", ".pth", ".onnx", ".gguf")
# In `widgets_values` of the canvas, behind the value of these, is what the control of a seed holds: no input.
SEEDS = ("seed", "noise_seed")


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
        widgets = widgets_of(node)
        nodes[str(node["id"])] = {"class_type": node["type"], "inputs": widgets | links}
    return nodes


def widgets_of(node: dict[str, Any]) -> dict[str, Any]:
    """The values of a node's widgets by name, without those of seeds' controls."""
    values, found = iter(node["widgets_values"]), {}
    for name in (entry["name"] for entry in node["inputs"] if "widget" in entry):
        found[name] = next(values)
        if name in SEEDS:
            assert next(values) in ("randomize", "fixed")
    assert not list(values)
    return found


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
        assert nodes[target]["inputs"][slot]["type"] in (kind, "*")
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


@pytest.mark.parametrize("name", WORKFLOWS)
def test_missing_models_can_be_offered(name: str) -> None:
    """ComfyUI's page knows where to get a widget's file that is named in the node's `models`; every such file is."""
    for node in canvas(name)["nodes"]:
        models = node["properties"].get("models", [])
        values = [value for value in node["widgets_values"] if isinstance(value, str)]
        assert {value for value in values if value.endswith(MODEL_FILES)} == {model["name"] for model in models}
        for model in models:
            assert model.keys() >= {"name", "url", "directory"} and model["url"].endswith(f"/{model['name']}")


def blueprint() -> tuple[dict[str, Any], dict[str, Any]]:
    """The node that is added to the canvas, and what it consists of."""
    graph = json.loads(BLUEPRINT.read_text(encoding="ascii"))  # ComfyUI 0.3.75 reads it in the system's encoding
    (host,), (definition,) = graph["nodes"], graph["definitions"]["subgraphs"]
    assert host["type"] == definition["id"]
    return host, definition


def test_the_blueprint_is_the_workflow_of_a_photo() -> None:
    """The same nodes with the same settings, without the photos before them and what shows their results."""
    _, definition = blueprint()
    twin = {node["class_type"]: node["inputs"] for node in api("photo_to_video_tiny").values()}
    for outside in ("MagicMirrorExamplePerson", "MagicMirrorVideoCombine"):
        del twin[outside]
    assert {node["type"] for node in definition["nodes"]} == twin.keys()
    for node in definition["nodes"]:
        values = {name: value for name, value in twin[node["type"]].items() if not isinstance(value, list)}
        assert widgets_of(node) == values


def test_the_blueprint_shows_its_inputs() -> None:
    """Each input of the node leads to one inside, of the same name but the photo's, and has the value of that one."""
    host, definition = blueprint()
    inside = {node["id"]: node for node in definition["nodes"]}
    links = {link["id"]: link for link in definition["links"]}
    assert [(slot["name"], slot["type"]) for slot in host["inputs"]] == [
        (slot["name"], slot["type"]) for slot in definition["inputs"]
    ]
    values = iter(host["widgets_values"])
    for number, slot in enumerate(definition["inputs"]):
        (link,) = (links[index] for index in slot["linkIds"])
        node = inside[link["target_id"]]
        target = node["inputs"][link["target_slot"]]
        assert (link["origin_id"], link["origin_slot"]) == (definition["inputNode"]["id"], number)
        assert (link["type"], target["link"]) == (slot["type"], link["id"])
        if "widget" in target:
            assert target["name"] == slot["name"]
            assert widgets_of(node)[slot["name"]] == next(values)
    assert next(values, None) is None


def test_the_blueprint_is_connected() -> None:
    host, definition = blueprint()
    ends = {definition["inputNode"]["id"]: definition["inputs"], definition["outputNode"]["id"]: definition["outputs"]}
    inside = {node["id"]: node for node in definition["nodes"]}
    for link in definition["links"]:
        source = ends.get(link["origin_id"]) or inside[link["origin_id"]]["outputs"]
        target = ends.get(link["target_id"]) or inside[link["target_id"]]["inputs"]
        assert source[link["origin_slot"]]["type"] == target[link["target_slot"]]["type"] == link["type"]
    assert [(slot["name"], slot["type"]) for slot in host["outputs"]] == [("video", "VIDEO"), ("images", "IMAGE")]
    assert all(len(slot["linkIds"]) == 1 for slot in definition["outputs"])


@pytest.mark.parametrize("name", WORKFLOWS)
def test_it_opens_in_view(name: str) -> None:
    """The note is first, below the menus of a page of 1600 x 1000; all else beside its side panel."""
    workflow = canvas(name)
    scale, (left, top) = workflow["extra"]["ds"]["scale"], workflow["extra"]["ds"]["offset"]
    (note,) = (node for node in workflow["nodes"] if node["type"] in NOTES)
    assert note["title"] == "Start here" and note["pos"] == [
        min(node["pos"][axis] for node in workflow["nodes"]) for axis in (0, 1)
    ]
    assert (note["pos"][0] + left) * scale > 60 and (note["pos"][1] + top) * scale > 145
    for axis, (offset, edge) in enumerate(((left, 1280), (top, 1000))):
        assert max(node["pos"][axis] + node["size"][axis] + offset for node in workflow["nodes"]) * scale <= edge


@pytest.mark.parametrize("name", WORKFLOWS)
def test_app_mode_shows_what_one_changes_and_gets(name: str) -> None:
    """Widgets that are there and not connected, the prompt or the shots among them, and the result."""
    workflow = canvas(name)
    nodes = {node["id"]: node for node in workflow["nodes"]}
    app = workflow["extra"]["linearData"]
    for node, widget in app["inputs"]:
        (slot,) = (slot for slot in nodes[node]["inputs"] if slot["name"] == widget)
        assert "widget" in slot and slot["link"] is None
    assert {"prompt", "shots"} & {widget for _, widget in app["inputs"]}
    (made,) = app["outputs"]
    assert nodes[made]["type"] in ("MagicMirrorVideoCombine", "SaveImage")
