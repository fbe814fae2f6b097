"""Where a clip goes on a real ComfyUI: names, numbers, folders; what is refused before anything runs."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from comfy_server import ComfyServer, ExecutionFailed, ExecutionInterrupted, WorkflowRefused
from PIL import Image

COMBINE = "MagicMirrorVideoCombine"
CANVAS = {"nodes": [{"id": 1, "type": "EmptyImage", "properties": {"Node name for S&R": "blank"}}], "version": 0.4}


def blank(**combine: Any) -> dict[str, dict[str, Any]]:
    """Some frames of one colour into a file."""
    return {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 32, "height": 16, "batch_size": 5, "color": 255}},
        "2": {
            "class_type": COMBINE,
            "inputs": {
                **{"images": ["1", 0], "frame_rate": 8.0, "filename_prefix": "x", "format": "mp4", "quality": 80},
                **combine,
            },
        },
    }


def save(server: ComfyServer, **combine: Any) -> dict[str, str]:
    """How the page is told of the file."""
    (file,) = server.run(blank(**combine))["outputs"]["2"]["images"]
    return file


def test_a_graph_of_before_the_newest_inputs_runs(any_server: ComfyServer) -> None:
    assert save(any_server, filename_prefix="old/clip")["subfolder"] == "old"


def test_tokens_act_as_in_cores_savers(any_server: ComfyServer, queue: Callable[..., str]) -> None:
    """The page replaces them for core's nodes only; by the name for replacing, and by the type without one."""
    today = f"{datetime.now():%Y-%m-%d}"
    graph = blank(filename_prefix="%date:yyyy-MM-dd%/%blank.batch_size%_%EmptyImage.width%_%width%x%height%")
    entry = any_server.wait(queue(any_server, graph, extra_data={"extra_pnginfo": {"workflow": CANVAS}}))
    (file,) = entry["outputs"]["2"]["images"]
    assert file["subfolder"] in (today, f"{datetime.now():%Y-%m-%d}")
    assert file["filename"] == "5_32_32x16_00001_.mp4"


@pytest.mark.parametrize("prefix", ["folder/", "", "named", "deep/er/named"])
def test_every_save_gets_a_number(server: ComfyServer, prefix: str) -> None:
    files = [save(server, filename_prefix=prefix, format="gif", quality=quality) for quality in (1, 2, 3)]
    numbers = [file["filename"].removesuffix("_.gif")[-5:] for file in files]
    assert [int(number) - int(numbers[0]) for number in numbers] == [0, 1, 2]
    for file in files:
        path = server.base / "output" / file["subfolder"] / file["filename"]
        assert path.is_file() and path.with_suffix(".png").is_file()
    assert files[0]["subfolder"] == str(Path(prefix + "x").parent).replace(".", "")


def test_another_output_folder_of_the_same_machine(server: ComfyServer) -> None:
    file = save(server, filename_prefix="preview/x", save_output=False)
    assert file["type"] == "temp" and len(server.view(**file)) > 100
    assert not (server.base / "output" / "preview").exists()


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"filename_prefix": "a:b"}, "':', which Windows allows in no file name"),
        ({"filename_prefix": "con/x"}, "'con', which is the name of a device on Windows"),
        ({"filename_prefix": "../x"}, "leads outside the folder"),
        ({"filename_prefix": "/etc/x"}, "leads outside the folder"),
        ({"filename_prefix": "\ud800"}, "half of a character"),
        ({"format": "gif", "audio": ["3", 0]}, "A gif file holds no sound"),
    ],
)
def test_refused_before_anything_runs(server: ComfyServer, changed: dict[str, Any], says: str) -> None:
    graph = blank(**changed)
    graph["3"] = {"class_type": "EmptyAudio", "inputs": {"duration": 1.0, "sample_rate": 16000, "channels": 1}}
    with pytest.raises(WorkflowRefused) as raised:
        server.run(graph)
    assert says in str(raised.value)


def test_a_prefix_from_another_node(server: ComfyServer) -> None:
    """It is not known before; tokens in it are."""
    graph = blank(filename_prefix=["3", 0])
    graph["3"] = {"class_type": "PrimitiveString", "inputs": {"value": "linked/%EmptyImage.height%"}}
    (file,) = server.run(graph)["outputs"]["2"]["images"]
    assert (file["subfolder"], file["filename"]) == ("linked", "16_00001_.mp4")
    graph["3"]["inputs"]["value"] = "../x"
    with pytest.raises(ExecutionFailed, match=r"SettingError.*leads outside the folder"):
        server.run(graph)


def test_a_link_that_leads_out(server: ComfyServer, tmp_path: Path) -> None:
    (server.base / "output" / "way_out").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(WorkflowRefused, match="leads outside the folder"):
        save(server, filename_prefix="way_out/x")
    assert not list(tmp_path.iterdir())


def test_too_large_for_the_format(server: ComfyServer) -> None:
    """Told with the sizes before a file is begun."""
    graph = blank(filename_prefix="large/x", format="webp")
    graph["1"]["inputs"].update(width=16384, batch_size=1)
    says = r"MagicMirror\.MagicMirrorError: .*16384 x 16 px; a webp file holds up to 16383 px a side"
    with pytest.raises(ExecutionFailed, match=says):
        server.run(graph)
    assert not (server.base / "output" / "large").exists()


def test_the_graph_is_in_the_file_as_it_was_sent(server: ComfyServer, queue: Callable[..., str]) -> None:
    """With its tokens, so that it goes on acting tomorrow."""
    graph = blank(filename_prefix="%date:yyyy%/kept", format="gif")
    entry = server.wait(queue(server, graph, extra_data={"extra_pnginfo": {"workflow": CANVAS}}))
    (file,) = entry["outputs"]["2"]["images"]
    picture = (server.base / "output" / file["subfolder"] / file["filename"]).with_suffix(".png")
    assert json.loads(Image.open(picture).text["prompt"])["2"]["inputs"]["filename_prefix"] == "%date:yyyy%/kept"


@pytest.mark.parametrize("format", ["mp4", "webm", "webp", "gif"])
def test_what_a_client_sends_beside_the_graph_costs_no_clip(
    server: ComfyServer, queue: Callable[..., str], format: str
) -> None:
    """Nodes that nothing needs, names that are none, keys that no file can have: ComfyUI looks at none of them."""
    graph = blank(filename_prefix="%Nobody.x%/%EmptyImage.width%_%a.b%", format=format)
    graph["8"] = {"class_type": "EmptyImage", "_meta": [], "inputs": {"x": []}}
    graph["9"] = {"class_type": "EmptyImage", "_meta": {"title": "Nobody"}, "inputs": {"x": "con."}}
    sent = {"workflow": {"nodes": [{"id": []}, 7], "definitions": {"subgraphs": [{"id": []}]}}}
    sent |= {"\ud800": 1, "\u043a\u043b\u044e\u0447" * 50: {}, "": [], "\0": "\ud800"}
    (file,) = server.wait(queue(server, graph, extra_data={"extra_pnginfo": sent}))["outputs"]["2"]["images"]
    assert (server.base / "output" / file["subfolder"] / file["filename"]).is_file()
    assert file["subfolder"] == "con_" and file["filename"].startswith("32_%a.b%_")


@pytest.mark.parametrize("format", ["mp4", "webp", "gif"])
def test_cancelling_while_a_clip_is_written(server: ComfyServer, format: str) -> None:
    """Before its many frames are written; nothing is left in the folder, and the next save works."""
    graph = blank(filename_prefix=f"cancelled_{format}/x", format=format, pingpong=True)
    graph["1"]["inputs"].update(width=768, height=768, batch_size=60)
    if format == "mp4":
        graph["2"]["inputs"]["loop_count"] = 20
    folder = server.base / "output" / f"cancelled_{format}"
    prompt = server.post(graph)
    deadline = time.monotonic() + 60
    while not folder.is_dir() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    server.interrupt()
    with pytest.raises(ExecutionInterrupted, match=COMBINE):
        server.wait(prompt)
    assert not list(folder.iterdir())
    assert save(server, filename_prefix=f"cancelled_{format}/x", format=format)["filename"].startswith("x_00001_")
