"""Likeness of clips, and what the adapter does to the base, on ComfyUI."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from comfy_server import ComfyServer, ExecutionFailed
from PIL import Image

SCORE, FACTORS = "MagicMirrorScoreIdentity", "MagicMirrorScaleFactors"


@pytest.fixture
def scored(server: ComfyServer, graph: Any, portrait: Callable[[str], Path]) -> Any:
    """The identity of a photo; clips of one frame: that photo (20), another person (21), both in a batch (22)."""
    for unused in ("MagicMirrorApplyCANAdapter", "MagicMirrorCogVideoXSampler", "MagicMirrorVideoCombine"):
        del graph[graph.id(unused)]
    photo = graph.id("LoadImage")
    graph.add("21", "LoadImage", image=server.upload_image(portrait("impostor_1")))
    size = {"upscale_method": "bilinear", "width": 320, "height": 400, "crop": "disabled"}
    graph.add("20", "ImageScale", image=[photo, 0], **size)
    graph.add("23", "ImageScale", image=["21", 0], **size)
    graph.add("22", "ImageBatch", image1=["23", 0], image2=["20", 0])
    graph.add(
        "30", SCORE, model=[graph.id("MagicMirrorLoader"), 0],
        identity=[graph.id("MagicMirrorExtractFaceEmbedding"), 0], images=["20", 0],
        clips=1, threshold=0.5, on_fail="pass through",
    )  # fmt: skip
    graph.add("31", "PreviewAny", source=["30", 5])
    graph.add("32", "PreviewImage", images=["30", 0])
    return graph


def report(entry: dict[str, Any]) -> dict[str, Any]:
    (text,) = entry["outputs"]["31"]["text"]
    return json.loads(text)


def test_own_photo_other_person_best_of_two(server: ComfyServer, scored: Any) -> None:
    entry = server.run(scored)
    own = report(entry)
    assert own["passed"] and own["score"] > 0.8
    assert "passed" in entry["outputs"]["30"]["text"][0] and len(entry["outputs"]["30"]["images"]) == 1  # the plot

    scored.inputs(SCORE)["images"] = ["23", 0]
    other = report(server.run(scored))
    assert not other["passed"] and other["score"] < 0.3

    scored.inputs(SCORE).update(images=["22", 0], clips=2)
    entry = server.run(scored)
    both = report(entry)
    assert both["best_index"] == 1 and both["score"] == pytest.approx(own["score"], abs=0.01)
    assert both["clips"][0]["score"] == pytest.approx(other["score"], abs=0.01)
    assert len(entry["outputs"]["32"]["images"]) == 1  # the frames of the best clip alone


def test_a_gate_that_stops(server: ComfyServer, scored: Any) -> None:
    scored.inputs(SCORE).update(images=["23", 0], on_fail="stop")
    with pytest.raises(ExecutionFailed, match=r"likeness -?0\.\d+, threshold 0\.500.*on_fail") as raised:
        server.run(scored)
    assert SCORE in str(raised.value)


def test_frames_that_are_no_clips(server: ComfyServer, scored: Any) -> None:
    scored.inputs(SCORE).update(images=["22", 0], clips=3)
    with pytest.raises(ExecutionFailed, match="2 frames are not 3 clips"):
        server.run(scored)


def test_scale_factors_as_a_picture(any_server: ComfyServer, any_graph: Any) -> None:
    """Of every modality, layer and time step, in their own colours."""
    for unused in ("MagicMirrorApplyCANAdapter", "MagicMirrorCogVideoXSampler", "MagicMirrorVideoCombine"):
        del any_graph[any_graph.id(unused)]
    model, identity = (any_graph.id(f"MagicMirror{node}") for node in ("Loader", "ExtractFaceEmbedding"))
    any_graph.add("30", FACTORS, model=[model, 0], identity=[identity, 0], steps=4)
    entry = any_server.run(any_graph)["outputs"]["30"]
    assert re.search(r"trained: .*\nof the variance: time step .*%, layer .*%, modality .*%", entry["text"][0])
    with Image.open(BytesIO(any_server.view(**entry["images"][0]))) as picture:
        assert picture.width > 3 * picture.height and len(picture.convert("RGB").getcolors(1 << 24)) > 50
