"""The release archive on a fresh ComfyUI, in a browser: no face models, no network, the Run button. On the newest page
and the oldest."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser_page import open_page, picture, run, show_all, unknown_nodes
from comfy_server import ComfyServer
from environment import PACK_FOLDER
from playwright.sync_api import Page


@pytest.fixture(scope="module", params=[0, 1], ids=["newest", "oldest"])
def fresh(
    request: pytest.FixtureRequest,
    comfyui_paths: tuple[Path, Path],
    pages: tuple[Path, Path],
    unpacked: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[ComfyServer]:
    base = tmp_path_factory.mktemp("fresh")
    shutil.copytree(unpacked, base / "custom_nodes" / PACK_FOLDER)
    options = ("--front-end-root", str(pages[request.param]))
    comfyui = comfyui_paths[request.param]
    with ComfyServer(comfyui, Path(sys.executable), base, pack=None, extra_args=options) as server:
        yield server


@pytest.fixture(scope="module")
def page(browser: Path, fresh: ComfyServer) -> Iterator[Page]:
    with open_page(browser, fresh.address, 1600, 1000) as page:
        yield page


def test_the_run_button_makes_a_clip(page: Page, fresh: ComfyServer) -> None:
    workflow = fresh.base / "custom_nodes" / PACK_FOLDER / "workflows" / "text_to_video_tiny.json"
    page.set_input_files("#comfy-file-input", workflow)
    page.wait_for_function("window.app.graph.nodes.some(node => node.type === 'MagicMirrorLoader')", timeout=30_000)
    page.wait_for_timeout(1000)
    assert unknown_nodes(page) == []
    version = "oldest" if "Try it out" in page.content() else "newest"
    picture(page, f"first_run_{version}_before.png")
    name = run(page, "tiny_")
    assert (fresh.base / "output" / "magic_mirror" / name).is_file()
    page.wait_for_timeout(1000)
    picture(page, f"first_run_{version}.png")
    assert "64 x 64 px, 9 frames, 12 ddim steps" in shown(page, "PreviewAny")


# What a node says in its widgets, as the page draws them: text boxes and rendered Markdown.
SAID = """kind => window.app.graph.nodes.filter(node => node.type === kind).flatMap(node => (node.widgets ?? []).map(
    widget => widget.element?.value || widget.element?.innerText || String(widget.value ?? '')
)).join('\\n')"""
PICTURES = """kind => window.app.graph.nodes.filter(node => node.type === kind).flatMap(node => (node.imgs ?? []).map(
    image => [image.naturalWidth, image.naturalHeight]
))"""


def shown(page: Page, kind: str) -> str:
    page.wait_for_function(f"kind => ({SAID})(kind).length > 20", arg=kind, timeout=30_000)
    return page.evaluate(SAID, kind)


def test_what_the_doctor_says_is_seen(page: Page) -> None:
    """As a picture on the node: the newest page draws no text that a node returns."""
    page.evaluate("""() => {
        window.app.graph.clear();
        window.app.graph.add(window.LiteGraph.createNode('MagicMirrorModelDoctor'));
    }""")
    show_all(page)
    page.get_by_test_id("queue-button").click()
    page.wait_for_function(f"kind => ({PICTURES})(kind).length === 1", arg="MagicMirrorModelDoctor", timeout=60_000)
    ((width, height),) = page.evaluate(PICTURES, "MagicMirrorModelDoctor")
    assert width == 720 and height > 100
