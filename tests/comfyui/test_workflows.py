"""The shipped workflows as a server offers them; test_archive.py runs them."""

from __future__ import annotations

from pathlib import Path

from comfy_server import ComfyServer

FOLDER = Path(__file__).resolve().parents[2] / "workflows"
CANVAS = sorted(FOLDER.glob("*.json"))


def test_every_workflow_has_a_twin_and_a_picture() -> None:
    assert CANVAS
    for path in CANVAS:
        assert (FOLDER / "api" / path.name).is_file(), path.name
        assert path.with_suffix(".jpg").is_file(), path.name


def test_all_are_in_the_template_browser(server: ComfyServer) -> None:
    listed = server.get("/workflow_templates")
    (ours,) = (names for names in listed.values() if CANVAS[0].stem in names)
    assert sorted(ours) == [path.stem for path in CANVAS]
