"""ComfyUI's page in a browser, as the tests drive it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from playwright.sync_api import Page, expect, sync_playwright

PICTURES = os.environ.get("MAGIC_MIRROR_PICTURES")
PICTURE_SCALE = 1.5  # pixels of a picture for each of the page's
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
# The page asks for things that a server without internet and without a login does not have; they are not ours.
NOT_OURS = (
    "Failed to load resource",
    "core workflow templates",
    "fuse options",  # of the search through them
    "ERR_INTERNET_DISCONNECTED",
    "ERR_NAME_NOT_RESOLVED",
    "Google",
    "firebase",
)


@contextmanager
def open_page(browser: Path, address: str, width: int, height: int) -> Iterator[Page]:
    """ComfyUI's page, as on a second start."""
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=str(browser), args=FLAGS)
        scale = PICTURE_SCALE if PICTURES else 1.0
        page = chromium.new_page(viewport={"width": width, "height": height}, device_scale_factor=scale)
        page.request.post(f"{address}/settings/Comfy.TutorialCompleted", data="true")  # no greeting over the canvas
        page.goto(address)
        page.wait_for_function("window.app?.graph && window.app.extensionManager", timeout=120_000)
        page.wait_for_timeout(3000)
        yield page
        chromium.close()


# Where all nodes are on the page, with some space around: x, y, width, height.
NODES = """() => {
    const {scale, offset} = window.app.canvas.ds;
    const canvas = window.app.canvas.canvas.getBoundingClientRect();
    const boxes = window.app.graph.nodes.map(node => Array.from(node.getBounding()));
    const x = Math.min(...boxes.map(b => b[0])) - 20, y = Math.min(...boxes.map(b => b[1])) - 40;
    const right = Math.max(...boxes.map(b => b[0] + b[2])) + 20, bottom = Math.max(...boxes.map(b => b[1] + b[3])) + 20;
    return {
        x: canvas.x + (x + offset[0]) * scale, y: canvas.y + (y + offset[1]) * scale,
        width: (right - x) * scale, height: (bottom - y) * scale,
    };
}"""


def picture(page: Page, name: str, nodes_only: bool = False) -> None:
    """Keep what the page shows, where the caller wants pictures."""
    if PICTURES:
        page.screenshot(path=str(Path(PICTURES) / name), clip=page.evaluate(NODES) if nodes_only else None)


def unknown_nodes(page: Page) -> list[str]:
    """Types on the canvas, inside its subgraphs too, that the page does not know."""
    types = page.evaluate("""() => {
        const all = graph => graph.nodes.flatMap(n => n.isSubgraphNode?.() ? all(n.subgraph) : [n]);
        return all(window.app.graph).map(n => n.type).filter(t => !(t in window.LiteGraph.registered_node_types));
    }""")
    return [kind for kind in types if kind not in ("Note", "MarkdownNote")]


def show_all(page: Page) -> None:
    """The whole graph: a node's video is loaded when the node is drawn."""
    page.evaluate("window.app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    page.wait_for_timeout(1000)


def run(page: Page, prefix: str) -> str:
    """Press the Run button; the file's name in the address of the video that then plays on its node."""
    page.get_by_test_id("queue-button").click()
    ours = f"v => v.videoWidth === 64 && v.videoHeight === 64 && v.readyState >= 2 && v.src.includes('{prefix}')"
    page.wait_for_function(f"[...document.querySelectorAll('video')].some({ours})", timeout=240_000)
    video = page.locator(f"video[src*='{prefix}']").first
    expect(video).to_be_visible()
    return parse_qs(urlsplit(video.get_attribute("src") or "").query)["filename"][0]
