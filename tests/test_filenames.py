"""What a filename_prefix stands for, and which ones are refused."""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from mm_core.errors import SettingError
from mm_core.filenames import expand, locate

NOW = datetime(2026, 3, 7, 15, 4, 9)
PROMPT: dict[str, Any] = {
    "3": {
        "class_type": "KSampler",
        "inputs": {"seed": 7, "cfg": 8.0, "denoise": 0.5, "add_noise": True, "steps": ["5", 0], "model": ["4", 0]},
        "_meta": {"title": "My sampler"},
    },
    "4": {"class_type": "Loader", "inputs": {"name": 'a/b:c*?"<>|\\d\n'}, "_meta": {"title": "Loader"}},
    "5": {"class_type": "PrimitiveInt", "inputs": {"value": 20}},
    "9:2": {"class_type": "Text", "inputs": {"text": "inside"}, "_meta": {"title": "Text"}},
    "8": {"class_type": "Text", "inputs": {"text": "outside"}, "_meta": {"title": "Text"}},
}
WORKFLOW: dict[str, Any] = {
    "nodes": [
        {"id": 3, "type": "KSampler", "properties": {"Node name for S&R": "sampler"}},
        {"id": 4, "type": "Loader", "properties": {"Node name for S&R": "Loader"}},
        {"id": 9, "type": "a-b-c", "properties": {}},
        {"id": 8, "type": "Text", "properties": {"Node name for S&R": "Text"}},
    ],
    "definitions": {
        "subgraphs": [
            {"id": "a-b-c", "nodes": [{"id": 2, "type": "Text", "properties": {"Node name for S&R": "Text"}}]}
        ]
    },
}


@pytest.mark.parametrize(
    ("prefix", "becomes"),
    [
        ("plain", "plain"),
        ("%date:yyyy-MM-dd%/clip", "2026-03-07/clip"),
        ("%date:yy-M-d_h-m-s%", "26-3-7_15-4-9"),
        ("%date:hh-mm-ss%", "15-04-09"),
        ("%date:yyyy/MM/dd%/x", "2026/03/07/x"),
        ("%date:hh:mm%", "15_04"),  # the page leaves the colon, which Windows forbids
        ("%date:yyy-HH%", "yyy-HH"),  # as the page: neither is one of its letters
        ("%year%-%month%-%day% %hour%.%minute%.%second%", "2026-03-07 15.04.09"),
        ("%width%x%height%", "720x480"),
        ("s%sampler.seed%", "s7"),
        ("%sampler.cfg%-%sampler.denoise%-%sampler.add_noise%", "8-0.5-true"),
        ("%My sampler.seed%", "7"),
        ("%KSampler.seed%", "7"),  # by its type, where a client sends no names
        ("%sampler.steps%", "20"),
        ("%Loader.name%", "a_b_c_______d_"),
        ("%Text.text%", "inside"),  # nodes in a subgraph come before the others, as on the page
        ("%Nobody.seed%/x", "%Nobody.seed%/x"),
        ("%sampler.nothing%", "%sampler.nothing%"),
        ("%sampler.model%", "%sampler.model%"),
        ("%a?/b.c%", "%a__b.c%"),
        ("100%", "100%"),
    ],
)
def test_tokens(prefix: str, becomes: str) -> None:
    assert expand(prefix, prompt=PROMPT, workflow=WORKFLOW, width=720, height=480, now=NOW) == becomes


def test_an_api_client_sends_no_workflow() -> None:
    assert expand("%KSampler.seed% %My sampler.seed%", prompt=PROMPT, now=NOW) == "7 7"


def test_before_the_graph_is_known_a_widget_is_a_word() -> None:
    assert expand("%KSampler.seed%/%date:yyyy%", now=NOW) == "x/2026"


@pytest.mark.parametrize(
    "workflow",
    [None, [], "x", {"nodes": 3}, {"nodes": [3, {"id": {}, "type": []}], "definitions": []}, {"nodes": None}],
)
def test_a_workflow_may_be_anything(workflow: Any) -> None:
    assert expand("%KSampler.seed%", prompt=PROMPT, workflow=workflow) == "7"


def test_a_workflow_of_subgraphs_within_subgraphs_ends() -> None:
    """Each holds the next one twice: 2 ** 40 nodes."""
    definitions = [
        {"id": str(depth), "nodes": [{"id": n, "type": str(depth + 1)} for n in (1, 2)]} for depth in range(40)
    ]
    workflow = {"nodes": [{"id": 1, "type": "0"}], "definitions": {"subgraphs": definitions}}
    assert expand("%Nobody.x%", prompt=PROMPT, workflow=workflow) == "%Nobody.x%"


@pytest.mark.parametrize(
    ("prefix", "folder", "name"),
    [
        ("clip", "", "clip"),
        ("videos/anna", "videos", "anna"),
        ("videos\\anna", "videos", "anna"),
        ("anna/", "anna", ""),
        ("", "", ""),
        ("./a/../b/c", "b", "c"),
        ("Ünïcode 画", "", "Ünïcode 画"),
        ("con", "", "con"),  # con_00001_.mp4 is no device
    ],
)
def test_where_files_go(tmp_path: Path, prefix: str, folder: str, name: str) -> None:
    assert locate(prefix, tmp_path, ".mp4") == (tmp_path / folder, name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrong", ["?", "<", ">", ":", "*", "|", '"', "\x00", "\n", "\x7f"])
@pytest.mark.parametrize("shape", ["{}", "folder{}/name", "name{}"])
def test_what_windows_forbids(tmp_path: Path, wrong: str, shape: str) -> None:
    with pytest.raises(SettingError, match="Windows allows in no file name"):
        locate(shape.format(wrong), tmp_path, ".mp4")


@pytest.mark.parametrize(
    ("prefix", "says"),
    [
        ("x" * 1001, "1001 characters; 1000 are the limit"),
        ("../outside", "leads outside"),
        ("/outside/x", "leads outside"),
        ("/", "leads outside"),
        ("a/../../outside/x", "leads outside"),
        ("aux/x", "'aux', which is the name of a device"),
        ("COM1/x", "name of a device"),
        ("nul.txt/x", "name of a device"),
        ("con.", "name of a device"),
        ("folder /x", "ends with a space or a dot"),
        ("folder./x", "ends with a space or a dot"),
        ("\ud800", "half of a character"),
        ("a" * 300 + "/x", "300 bytes; 255 are the limit"),
    ],
)
def test_refused(tmp_path: Path, prefix: str, says: str) -> None:
    with pytest.raises(SettingError) as raised:
        locate(expand(prefix), tmp_path, ".mp4")
    assert says in str(raised.value) and "filename_prefix" in str(raised.value)


def test_a_long_name_is_cut(tmp_path: Path) -> None:
    """As one with a prompt in it may be; between characters, and with room for number and suffix."""
    _, name = locate("ü" * 300, tmp_path, ".mp4")
    assert set(name) == {"ü"} and 200 < len(name.encode()) < 240


def test_a_link_that_leads_out_is_refused(tmp_path: Path) -> None:
    root, outside = tmp_path / "output", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    try:
        os.symlink(outside, root / "link", target_is_directory=True)
        os.symlink(root, tmp_path / "same", target_is_directory=True)
    except OSError:
        pytest.skip("this user may make no links")
    with pytest.raises(SettingError, match="leads outside"):
        locate("link/x", root, ".mp4")
    assert locate("people/x", tmp_path / "same", ".mp4")[1] == "x"
