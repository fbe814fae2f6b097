"""What a browser shows of a saved clip: its colours, at sizes at which players guess differently what is not tagged."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlencode

import numpy as np
import pytest
from comfy_server import ComfyServer
from PIL import Image
from playwright.sync_api import Page, sync_playwright

COLOURS = np.array(
    [(40, 160, 60), (200, 30, 30), (30, 30, 200), (224, 172, 140), (250, 240, 20), (10, 200, 220), (128, 128, 128)]
)
WIDTHS = {64: 112, 480: 720, 768: 1360}

# The colours in the middle of each of `count` stripes, of a video's or an animated picture's frame.
SHOWN = """async ([address, isVideo, count]) => {
    const shown = document.createElement(isVideo ? 'video' : 'img');
    shown.muted = true;
    document.body.replaceChildren(shown);
    const event = name => new Promise((done, fail) => {
        shown.addEventListener(name, done, {once: true});
        shown.addEventListener('error', () => fail(new Error('it cannot be shown')), {once: true});
    });
    const ready = event(isVideo ? 'loadeddata' : 'load');
    shown.src = address;
    await ready;
    if (isVideo) {
        const there = new Promise(done => shown.requestVideoFrameCallback(done));
        const sought = event('seeked');
        shown.currentTime = 0.2;
        await sought;
        await Promise.race([there, new Promise(done => setTimeout(done, 2000))]);
    }
    const canvas = document.createElement('canvas');
    canvas.width = shown.videoWidth || shown.naturalWidth;
    canvas.height = shown.videoHeight || shown.naturalHeight;
    const context = canvas.getContext('2d', {colorSpace: 'srgb'});
    context.drawImage(shown, 0, 0);
    return Array.from({length: count}, (_, index) => {
        const x = Math.floor((index + 0.5) * canvas.width / count);
        return Array.from(context.getImageData(x, canvas.height / 2, 1, 1).data.slice(0, 3));
    });
}"""


@pytest.fixture(scope="module")
def page(browser: Path, server: ComfyServer) -> Iterator[Page]:
    """An empty page of the server."""
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=str(browser), args=("--no-sandbox", "--disable-gpu"))
        page = chromium.new_page()
        page.goto(f"{server.address}/system_stats")
        yield page
        chromium.close()


@pytest.mark.parametrize("height", WIDTHS)
@pytest.mark.parametrize("format", ["mp4", "webm", "webp"])
def test_a_browser_shows_the_colours_of_the_frames(
    page: Page, server: ComfyServer, tmp_path: Path, format: str, height: int
) -> None:
    """Within three levels of 255 in every channel."""
    stripes = np.linspace(0, len(COLOURS), WIDTHS[height], endpoint=False).astype(int)
    picture = tmp_path / f"stripes_{height}.png"
    Image.fromarray(COLOURS[stripes].astype(np.uint8)[None].repeat(height, axis=0)).save(picture)
    graph = {
        "1": {"class_type": "LoadImage", "inputs": {"image": server.upload_image(picture)}},
        "2": {"class_type": "RepeatImageBatch", "inputs": {"image": ["1", 0], "amount": 5}},
        "3": {
            "class_type": "MagicMirrorVideoCombine",
            "inputs": {
                "images": ["2", 0], "frame_rate": 8.0, "filename_prefix": "colours", "format": format, "quality": 80,
            },
        },
    }  # fmt: skip
    (file,) = server.run(graph)["outputs"]["3"]["images"]
    shown = page.evaluate(SHOWN, [f"/view?{urlencode(file)}", format != "webp", len(COLOURS)])
    assert np.abs(np.array(shown) - COLOURS).max() <= 3, shown
