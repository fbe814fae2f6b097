"""A graph of nodes as ComfyUI takes it: in API format, for the canvas, and as a subgraph blueprint.

`info` is what /object_info says: which inputs the nodes have and in which order.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any

WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
# Where nodes may be on a page of 1600 x 1000 pixels: below its menus and what it announces, beside its side panel.
LEFT, TOP, RIGHT, BOTTOM = 75, 150, 1280, 995
SCALES = (1.0, 0.9, 0.8, 0.75, 0.7, 0.65, 0.6)
COLUMN, GAP, TITLE = 320, 30, 30
# The page's measures of a node: a row of sockets, a widget, a text box, what is around them.
SOCKET, WIDGET, TEXT, EDGE = 20, 24, 80, 14
# What a node needs for what it says and shows in a run. It has the room from the start, for not every version of the
# page lets it grow; only a node with text boxes grows, or they would take the room and give it back.
SHOWN = {
    "MagicMirrorLoader": 50, "MagicMirrorExamplePerson": 212, "MagicMirrorExtractFaceEmbedding": 356,
    "MagicMirrorVideoCombine": 312, "MagicMirrorScoreIdentity": 270, "SaveImage": 212, "SamplerCustomAdvanced": 224,
}  # fmt: skip
GROWTH = {"MagicMirrorCogVideoXSampler": 356}
NOTE, NOTE_HEIGHT = "MarkdownNote", 290
# What App mode shows of a graph that has it: widgets to which nothing is connected, and what is made.
APP_INPUTS = (
    ("example", "person"), ("shots", "description"), ("shots", "shots"), ("shots", "seed"), ("apply", "prompt"),
    ("sampler", "prompt"), ("sampler", "seed"), ("noise", "noise_seed"),
)  # fmt: skip
APP_OUTPUT = "video"
# The page's ids of the nodes at a subgraph's edges.
INPUTS, OUTPUTS = -10, -20

# (node, number of its output)
Link = tuple[str, int]


@dataclass(frozen=True, kw_only=True)
class Node:
    """A node by its type; `inputs` are links and the values that differ from the defaults."""

    type: str
    inputs: dict[str, Any]
    title: str | None = None
    models: tuple[dict[str, str], ...] = ()
    """Files of its inputs that the page can offer to download: name, url, directory."""


@dataclass(frozen=True, kw_only=True)
class Blueprint:
    """A subgraph that is added to the canvas as one node.

    Links from "photo" come from outside. `widgets` are the inputs shown on the node, `outputs` its outputs by name.
    """

    nodes: dict[str, Node]
    widgets: tuple[tuple[str, str], ...]  # (node, input)
    outputs: dict[str, Link]
    description: str
    aliases: tuple[str, ...]


def to_api(nodes: dict[str, Node], info: dict[str, Any]) -> dict[str, Any]:
    """The graph as /prompt takes it, every input with its value."""
    numbers = {key: str(number) for number, key in enumerate(nodes, 1)}
    graph = {}
    for key, node in nodes.items():
        inputs = {}
        for name, kind, options in _inputs(info[node.type]):
            value = node.inputs.get(name, _default(kind, options))
            if isinstance(value, tuple):
                inputs[name] = [numbers[value[0]], value[1]]
            elif _is_widget(kind):
                inputs[name] = value
        graph[numbers[key]] = {
            "class_type": node.type, "inputs": inputs,
            "_meta": {"title": node.title or info[node.type]["display_name"]},
        }  # fmt: skip
    return graph


def to_canvas(name: str, note: str, nodes: dict[str, Node], info: dict[str, Any]) -> dict[str, Any]:
    """The graph as the page saves it."""
    numbers = {key: number for number, key in enumerate(nodes, 1)}
    made, links = _make(nodes, numbers, info)
    start = {
        "id": len(nodes) + 1, "type": NOTE, "pos": [0, 0], "size": [COLUMN, NOTE_HEIGHT],
        "flags": {}, "order": len(nodes), "mode": 0, "inputs": [], "outputs": [], "properties": {},
        "widgets_values": [note], "title": "Start here",
    }  # fmt: skip
    scale = next(s for s in SCALES if _place({NOTE: start} | made, nodes, (BOTTOM - TOP) / s) <= (RIGHT - LEFT) / s)
    placed = [*made.values(), start]
    widgets = {
        key: {slot["name"] for slot in node["inputs"] if "widget" in slot and slot["link"] is None}
        for key, node in made.items()
    }
    app = {
        "inputs": [[numbers[key], name] for key, name in APP_INPUTS if name in widgets.get(key, ())],
        "outputs": [numbers[APP_OUTPUT]],
    }
    return {
        "id": _identifier(name), "revision": 0, "last_node_id": len(placed),
        "last_link_id": len(links), "nodes": placed, "links": links, "groups": [], "config": {},
        "extra": {"ds": {"scale": scale, "offset": [LEFT / scale, TOP / scale]}, "linearData": app}, "version": 0.4,
    }  # fmt: skip


def to_blueprint(name: str, blueprint: Blueprint, info: dict[str, Any]) -> dict[str, Any]:
    """The subgraph as the page publishes it: a graph of one node, whose type is defined beside it."""
    numbers = {key: number for number, key in enumerate(blueprint.nodes, 1)}
    made, links = _make(blueprint.nodes, numbers | {"photo": INPUTS}, info)
    _place(made, blueprint.nodes, (BOTTOM - TOP) / 0.75)
    placed = list(made.values())
    slots = [{"name": "photo", "type": "IMAGE", "link": None}]
    values = []
    for key, widget in blueprint.widgets:
        inner = placed[numbers[key] - 1]
        widgets = [slot["name"] for slot in inner["inputs"] if "widget" in slot]
        index, slot = next((i, s) for i, s in enumerate(inner["inputs"]) if s["name"] == widget)
        slot["link"] = len(links) + 1
        links.append([slot["link"], INPUTS, len(slots), inner["id"], index, slot["type"]])
        slots.append({"name": widget, "type": slot["type"], "widget": {"name": widget}, "link": None})
        values.append(inner["widgets_values"][widgets.index(widget)])
    outputs = []
    for slot, (output, (key, index)) in enumerate(blueprint.outputs.items()):
        kind = info[blueprint.nodes[key].type]["output"][index]
        links.append([len(links) + 1, numbers[key], index, OUTPUTS, slot, kind])
        outputs.append({"name": output, "type": kind, "links": None})
    _name_links(placed, links)  # again, those to its edges too
    definition = _definition(name, blueprint, placed, links, slots, outputs)
    host = {
        "id": 1, "type": definition["id"], "pos": [0, 0], "size": [COLUMN, 120 + 26 * len(slots)], "flags": {},
        "order": 0, "mode": 0, "inputs": slots, "outputs": outputs, "properties": {}, "widgets_values": values,
        "title": name,
    }  # fmt: skip
    return {
        "revision": 0, "last_node_id": 1, "last_link_id": 0, "nodes": [host], "links": [], "version": 0.4,
        "definitions": {"subgraphs": [definition]},
        "extra": {
            "BlueprintDescription": blueprint.description, "BlueprintSearchAliases": list(blueprint.aliases),
        },
    }  # fmt: skip


def _definition(
    name: str,
    blueprint: Blueprint,
    placed: list[dict[str, Any]],
    links: list[list[Any]],
    slots: list[dict[str, Any]],
    outputs: list[dict[str, Any]],
) -> dict[str, Any]:
    """What the node of a blueprint consists of."""
    right = max(node["pos"][0] for node in placed) + COLUMN + GAP

    def edge(end: int, entries: list[dict[str, Any]], link_end: int, link_slot: int) -> list[dict[str, Any]]:
        return [
            {
                "id": _identifier(f"{name}/{end}/{entry['name']}"), "name": entry["name"], "type": entry["type"],
                "linkIds": [link[0] for link in links if link[link_end] == end and link[link_slot] == number],
            }
            for number, entry in enumerate(entries)
        ]  # fmt: skip

    return {
        "id": _identifier(name), "version": 1, "revision": 0, "config": {}, "name": name,
        "state": {"lastGroupId": 0, "lastNodeId": len(placed), "lastLinkId": len(links), "lastRerouteId": 0},
        "inputNode": {"id": INPUTS, "bounding": [-200, 0, 120, 40 + 20 * len(slots)]},
        "outputNode": {"id": OUTPUTS, "bounding": [right, 0, 120, 40 + 20 * len(outputs)]},
        "inputs": edge(INPUTS, slots, 1, 2), "outputs": edge(OUTPUTS, outputs, 3, 4), "widgets": [],
        "nodes": placed, "groups": [],
        "links": [
            dict(zip(("id", "origin_id", "origin_slot", "target_id", "target_slot", "type"), link)) for link in links
        ],
        "extra": {}, "category": "Magic Mirror", "description": blueprint.description,
    }  # fmt: skip


def _identifier(name: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_URL, name))


def _make(
    nodes: dict[str, Node], numbers: dict[str, int], info: dict[str, Any]
) -> tuple[dict[str, dict[str, Any]], list[list[Any]]]:
    """The nodes as the page has them, and the links between them."""
    links: list[list[Any]] = []
    made = {
        key: _node(node, numbers[key], order, links, numbers, nodes, info)
        for order, (key, node) in enumerate(nodes.items())
    }
    _name_links(list(made.values()), links)
    return made, links


def _place(made: dict[str, dict[str, Any]], nodes: dict[str, Node], limit: float) -> float:
    """Put the nodes into columns of a height of at most `limit`; returns how wide they are together.

    A node is in the first column with room for it as it is after a run, to the right of all that it takes something
    from or below it.
    """
    depths, columns = _depths(nodes), {}
    filled: list[float] = []
    for key in sorted(made, key=lambda key: depths.get(key, -1)):
        sources = [value[0] for value in nodes[key].inputs.values() if isinstance(value, tuple)] if key in nodes else []
        height = TITLE + made[key]["size"][1] + GROWTH.get(made[key]["type"], 0)
        first = max((columns[source] for source in sources if source in columns), default=0)
        column = next((c for c in range(first, len(filled)) if filled[c] + height <= limit), len(filled))
        if column == len(filled):
            filled.append(0.0)
        made[key]["pos"] = [column * (COLUMN + GAP), round(filled[column] + TITLE)]
        columns[key] = column
        filled[column] += height + GAP
    return len(filled) * (COLUMN + GAP) - GAP


def _name_links(placed: list[dict[str, Any]], links: list[list[Any]]) -> None:
    """Tell every output its links."""
    for entry in placed:
        for slot, output in enumerate(entry["outputs"]):
            output["links"] = [link[0] for link in links if link[1] == entry["id"] and link[2] == slot] or None


def _node(
    node: Node,
    number: int,
    order: int,
    links: list[list[Any]],
    numbers: dict[str, int],
    nodes: dict[str, Node],
    info: dict[str, Any],
) -> dict[str, Any]:
    about = info[node.type]
    inputs, values, height = [], [], EDGE + SHOWN.get(node.type, 0)
    for name, kind, options in _inputs(about):
        value = node.inputs.get(name, _default(kind, options))
        entry: dict[str, Any] = {"name": name, "type": kind, "link": None}
        if _is_widget(kind):
            entry["widget"] = {"name": name}
            values.append(_default(kind, options) if isinstance(value, tuple) else value)
            height += TEXT if options.get("multiline") else WIDGET
            if options.get("control_after_generate"):
                values.append("fixed" if isinstance(value, tuple) else "randomize")
                height += WIDGET
            if options.get("image_upload"):
                values.append("image")
        elif name in about["input"].get("optional", {}):
            entry["shape"] = 7
        if isinstance(value, tuple):
            entry["link"] = len(links) + 1
            source = info[nodes[value[0]].type]["output"][value[1]] if value[0] in nodes else kind
            links.append([entry["link"], numbers[value[0]], value[1], number, len(inputs), source])
        inputs.append(entry)
    outputs = [{"name": n, "type": t} for n, t in zip(about["output_name"], about["output"])]
    height += SOCKET * max(len(outputs), sum("widget" not in entry for entry in inputs))
    made = {
        "id": number, "type": node.type, "pos": [0, 0], "size": [COLUMN, height], "flags": {}, "order": order,
        "mode": 0, "inputs": inputs, "outputs": outputs, "properties": {"Node name for S&R": node.type},
        "widgets_values": values,
    }  # fmt: skip
    if node.models:
        made["properties"]["models"] = list(node.models)
    return made | ({"title": node.title} if node.title else {})


def _inputs(about: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """(name, type, options) in the order of the node."""
    found = []
    for section in ("required", "optional"):
        for name in about["input_order"].get(section, []):
            kind, *rest = about["input"][section][name]
            options = dict(rest[0]) if rest else {}
            if isinstance(kind, list):  # how older nodes write a choice
                kind, options["options"] = "COMBO", kind
            found.append((name, kind, options))
    return found


def _is_widget(kind: str) -> bool:
    return kind in WIDGETS


def _default(kind: str, options: dict[str, Any]) -> Any:
    if not _is_widget(kind):
        return None
    if "default" in options:
        return options["default"]
    return options["options"][0] if kind == "COMBO" and options.get("options") else {"STRING": ""}.get(kind, 0)


def _depths(nodes: dict[str, Node]) -> dict[str, int]:
    """The column of each node: one to the right of the last that it takes something from."""
    depths: dict[str, int] = {}
    for _ in nodes:
        for key, node in nodes.items():
            before = [depths.get(value[0], 0) for value in node.inputs.values() if isinstance(value, tuple)]
            depths[key] = 1 + max(before) if before else 0
    return depths
