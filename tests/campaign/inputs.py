"""Bad inputs for every widget and socket of every node of the pack, made of what ComfyUI says about the nodes."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .values import ANYTHING, SOCKETS, WIDGETS

Graph = dict[str, dict[str, Any]]

_HUGE, _NAN, _INF = 2**70, float("nan"), float("inf")
_OF_NUMBERS: list[object] = [_HUGE, -_HUGE, _NAN, _INF, -_INF, "", "abc", "1e", None, {}, [], [1], "\ud800"]
_TEXTS: list[object] = [
    "", " ", "\n\t", "\ud800", "\0", "a\x1b[2J", "\u202e", "../../x", "/etc/passwd", "C:\\x", "con", "a" * 300,
    "img " * 9, "%a.b%", "%date:%", None, 7, {}, [],
]  # fmt: skip
_CHOICES: list[object] = ["gone", "", "../x", "/etc/passwd", "\ud800", "\0", "x" * 5000, None, 7, True, _NAN, {}, []]
DIRECT: dict[str, list[object]] = {
    "INT": [-1, *_OF_NUMBERS],
    "FLOAT": [-1e9, 1e9, *_OF_NUMBERS],
    "STRING": _TEXTS,
    "COMBO": _CHOICES,
    "BOOLEAN": ["maybe", None, {}, _NAN],
}
KNOWN_LATER = {
    ("MagicMirrorVideoCombine", "skip_first_frames"),
    ("MagicMirrorVideoCombine", "skip_last_frames"),
    ("MagicMirrorScoreIdentity", "clips"),
}
"""Widgets whose limit is the number of frames, which the sampler decides."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One bad input in a graph that is good otherwise. late: an error must come before anything runs."""

    node: str
    input: str
    what: str
    graph: Graph
    before: bool

    @property
    def name(self) -> str:
        return f"{self.node}.{self.input}: {self.what}"


def good_graph() -> Graph:
    """Each node of the pack once, on tiny, with what it needs; the key is the node's id without the pack's name."""
    mirror, person = ["Loader", 0], ["ExtractFaceEmbedding", 0]
    words = {"prompt": "A man img smiles.", "steps": 1, "width": 64, "height": 64, "num_frames": 1}
    inputs: dict[str, dict[str, Any]] = {
        "Loader": {}, "ModelDoctor": {}, "ExamplePerson": {}, "Control": {}, "Shots": {},
        "ExtractFaceEmbedding": {"model": mirror, "image": ["ExamplePerson", 0]},
        "ApplyCANAdapter": {"model": mirror, "identity": person},
        "LoRA": {"model": mirror, "lora_name": "campaign.safetensors"},
        "PromptHelper": {"model": mirror},
        "CogVideoXSampler": {"model": ["ApplyCANAdapter", 0], **words, "negative_prompt": ""},
        "VideoCombine": {"images": ["CogVideoXSampler", 0], "format": "gif", "filename_prefix": "campaign/x"},
        "ScoreIdentity": {"model": mirror, "identity": person, "images": ["CogVideoXSampler", 0]},
        "ScaleFactors": {"model": mirror, "identity": person},
        "SaveIdentity": {"identity": person},
        "LoadIdentity": {"model": mirror, "file": "campaign.safetensors"},
        "NativeModel": {"magic_mirror": mirror},
        "ApplyNative": {"model": ["NativeModel", 0], "magic_mirror": mirror, "identity": person},
        "EncodePrompt": {"magic_mirror": mirror},
        "NativeSampling": {"model": ["NativeModel", 0]},
        "NativeLatent": {"magic_mirror": mirror, "width": 64, "height": 64, "num_frames": 9},
        "Decode": {"magic_mirror": mirror, "samples": ["NativeLatent", 0]},
    }  # fmt: skip
    return {key: {"class_type": f"MagicMirror{key}", "inputs": values} for key, values in inputs.items()}


def cases(nodes: Mapping[str, Any]) -> Iterator[Case]:
    """All bad inputs. nodes: ComfyUI's description of the pack's nodes, `/object_info`."""
    whole = _with_defaults(good_graph(), nodes)
    for key, node in whole.items():
        described = nodes[node["class_type"]]
        for name, (type_, options) in _inputs(described):
            graph = _only(whole, key, is_output=described["output_node"])
            for what, value, helper in _values(type_, options, required=name in described["input"]["required"]):
                changed = copy.deepcopy(graph)
                changed[key]["inputs"].pop(name, None)
                if value is not _ABSENT:
                    changed[key]["inputs"][name] = value
                later = (node["class_type"], name) in KNOWN_LATER
                before = not helper and type_ in DIRECT and "CogVideoXSampler" in graph and not later
                before &= value is not None  # that is how ComfyUI's validation shows what is connected
                before &= key != "CogVideoXSampler"  # its own are looked at when the model is known, before it loads
                changed |= helper
                yield Case(node=node["class_type"], input=name, what=what, graph=changed, before=before)


_ABSENT = object()


def _values(type_: str, options: Mapping[str, Any], *, required: bool) -> Iterator[tuple[str, object, Graph]]:
    """What it is, what stands in the graph, and a node that gives it."""
    direct = DIRECT.get(type_, [])
    if type_ in ("INT", "FLOAT"):
        direct = [bound for bound in (options.get("min", 0) - 1, options.get("max", 0) + 1)] + direct
    for value in direct:
        yield repr(value)[:40], value, {}
    if required:
        yield "absent", _ABSENT, {}
    for kind in WIDGETS.get(type_) or SOCKETS.get(type_) or ANYTHING:
        helper = {"value": {"class_type": "CampaignValue", "inputs": {"type": type_, "kind": kind}}}
        yield f"connected, {kind}", ["value", 0], helper


def _inputs(described: Mapping[str, Any]) -> Iterator[tuple[str, tuple[str, Mapping[str, Any]]]]:
    """Name, type and options of each input; a combo's list of older descriptions is COMBO."""
    for group in ("required", "optional"):
        for name, (type_, *rest) in described["input"].get(group, {}).items():
            options = rest[0] if rest else {}
            yield name, ("COMBO" if isinstance(type_, list) else type_, options)


def _with_defaults(graph: Graph, nodes: Mapping[str, Any]) -> Graph:
    for node in graph.values():
        for name, (_, options) in _inputs(nodes[node["class_type"]]):
            if "default" in options:
                node["inputs"].setdefault(name, options["default"])
    return graph


def _only(graph: Graph, key: str, *, is_output: bool) -> Graph:
    """A node, what it needs, and something that makes it run."""
    found: Graph = {}
    wanted = [key]
    while wanted:
        name = wanted.pop()
        found[name] = graph[name]
        wanted += [value[0] for value in graph[name]["inputs"].values() if isinstance(value, list)]
    if not is_output:
        found["shown"] = {"class_type": "PreviewAny", "inputs": {"source": [key, 0]}}
    return found
