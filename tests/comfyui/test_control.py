"""The Control node on a real ComfyUI; on core's CogVideoX: test_native.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from comfy_server import ComfyServer, ExecutionFailed

APPLY, CONTROL = "MagicMirrorApplyCANAdapter", "MagicMirrorControl"
PARTS = ("identity", "can", "ip")

Run = Callable[..., np.ndarray]


def controlled(graph: Any, **control: Any) -> Any:
    """The graph with a Control node."""
    graph = graph.copy()
    graph.add("40", CONTROL, **control)
    graph.inputs(APPLY)["control"] = ["40", 0]
    return graph


def test_balanced_is_what_the_node_does_without(any_server: ComfyServer, any_graph: Any, run: Run) -> None:
    balanced = controlled(any_graph, preset="balanced")
    assert np.array_equal(run(any_server, any_graph), run(any_server, balanced))


def test_control_takes_the_place_of_the_nodes_own(server: ComfyServer, graph: Any, run: Run) -> None:
    """The same numbers for each part in Control, whatever Apply says, are those for all in Apply."""
    own = graph.copy()
    scales = dict(identity_scale=0.7, can_scale=1.3, ip_scale=0.9)
    own.inputs(APPLY).update(scales, start_percent=0.3, end_percent=0.6)
    starts = {f"{part}_start_percent": 0.3 for part in PARTS}
    ends = {f"{part}_end_percent": 0.6 for part in PARTS}
    graph.inputs(APPLY).update(identity_scale=0.0, end_percent=0.5)
    custom = controlled(graph, preset="custom", **scales, **starts, **ends)
    assert np.array_equal(run(server, own), run(server, custom))


def test_a_preset_shows_and_is_its_numbers(server: ComfyServer, graph: Any, run: Run) -> None:
    """Numbers beside a preset do not act."""
    motion = controlled(graph, preset="motion first", ip_scale=3.0)
    (shown,) = server.run(motion)["outputs"]["40"]["text"]
    assert shown == (
        "motion first: text fusion 1 from 0 to 1, CAN 0.8 from 0 to 0.6, cross-attention 0.8 from 0 to 0.6"
    )
    numbers = controlled(graph, preset="custom", can_scale=0.8, can_end_percent=0.6, ip_scale=0.8, ip_end_percent=0.6)
    frames = run(server, motion)
    assert np.array_equal(frames, run(server, numbers))
    assert not np.array_equal(frames, run(server, graph))


def test_a_start_after_the_end(server: ComfyServer, graph: Any) -> None:
    with pytest.raises(ExecutionFailed, match=r"can_start \(0.9\) is after end \(0.2\); swap them"):
        server.run(controlled(graph, preset="custom", can_start_percent=0.9, can_end_percent=0.2))


def test_a_weight_and_a_preset_of_the_node_itself(server: ComfyServer, graph: Any, run: Run) -> None:
    """They multiply what the advanced inputs say, and a preset's windows lie in the node's own."""
    graph.inputs(APPLY).update(can_scale=1.5, start_percent=0.1)
    own = graph.copy()
    own.inputs(APPLY).update(weight=0.5, preset="motion first")
    starts = {f"{part}_start_percent": 0.1 for part in PARTS}
    numbers = dict(identity_scale=0.5, can_scale=0.6, can_end_percent=0.6, ip_scale=0.4, ip_end_percent=0.6)
    same = controlled(graph, preset="custom", **numbers, **starts)
    frames = run(server, own)
    assert np.array_equal(frames, run(server, same))
    assert not np.array_equal(frames, run(server, graph))


def test_switches_of_either_node(server: ComfyServer, graph: Any, run: Run) -> None:
    """What is off on Control is off, as on Apply."""
    here, there = controlled(graph, preset="balanced"), controlled(graph, preset="balanced", structure_branch=False)
    here.inputs(APPLY)["structure_branch"] = False
    frames = run(server, here)
    assert np.array_equal(frames, run(server, there))
    assert not np.array_equal(frames, run(server, graph))
