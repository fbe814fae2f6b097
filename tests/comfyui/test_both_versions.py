"""Photo and prompt to video, caching and cancelling, on the current ComfyUI and on the oldest supported one."""

from __future__ import annotations

import contextlib
import io
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import websocket
from comfy_server import ComfyServer, ExecutionInterrupted
from environment import PACK_FOLDER
from PIL import Image

SAMPLER, COMBINE = "MagicMirrorCogVideoXSampler", "MagicMirrorVideoCombine"
CANVAS = {"nodes": [], "links": [], "version": 0.4}
SUBGRAPHS = Path(__file__).resolve().parents[2] / "subgraphs"


@pytest.mark.parametrize("format", ["mp4", "webm"])
def test_a_video_with_its_workflow(
    any_server: ComfyServer,
    any_graph: Any,
    format: str,
    saved: Callable[..., dict[str, str]],
    queue: Callable[..., str],
) -> None:
    any_graph.inputs(COMBINE).update(format=format, frame_rate=12.0)
    entry = any_server.wait(queue(any_server, any_graph, extra_data={"extra_pnginfo": {"workflow": CANVAS}}))
    file = saved(entry, any_graph)
    assert entry["outputs"][any_graph.id(COMBINE)]["animated"] == [True]
    assert file["subfolder"] == "magic_mirror" and file["type"] == "output"
    with av.open(io.BytesIO(any_server.view(**file))) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height) == (64, 64)
        assert stream.average_rate == 12
        metadata = {key.lower(): value for key, value in container.metadata.items()}
        assert sum(1 for _ in container.decode(stream)) == 9
    assert json.loads(metadata["workflow"]) == CANVAS
    assert json.loads(metadata["prompt"])[any_graph.id(SAMPLER)]["inputs"] == any_graph.inputs(SAMPLER)


def test_another_seed_runs_the_sampler_only(
    any_server: ComfyServer,
    any_graph: Any,
    run: Callable[..., np.ndarray],
    saved: Callable[..., dict[str, str]],
    decode: Callable[..., np.ndarray],
) -> None:
    first = run(any_server, any_graph)
    any_graph.inputs(SAMPLER)["seed"] += 1
    entry = any_server.run(any_graph)
    assert any_server.cached_nodes(entry) == any_graph.keys() - {any_graph.id(SAMPLER), any_graph.id(COMBINE)}
    assert not np.array_equal(first, decode(any_server.view(**saved(entry, any_graph))))


def test_the_blueprint_is_offered(any_server: ComfyServer) -> None:
    """Listed among the subgraphs of all packs, and handed out as it is."""
    listed = any_server.get("/global_subgraphs")
    (found,) = (key for key, entry in listed.items() if entry["info"]["node_pack"] == f"custom_nodes.{PACK_FOLDER}")
    assert listed[found]["name"] == "Face to video"
    content = any_server.get(f"/global_subgraphs/{found}")["data"]
    assert content == (SUBGRAPHS / "Face to video.json").read_text(encoding="ascii")


def test_cancelling_takes_one_step(any_server: ComfyServer, any_graph: Any, queue: Callable[..., str]) -> None:
    """Progress and previews arrive, cancelling stops the sampler, and the next clip is made as if nothing had been."""
    any_graph.inputs(SAMPLER)["steps"] = 900
    with Page(any_server) as page:
        prompt_id = queue(any_server, any_graph, client_id=page.client_id)
        page.wait_for_steps(5)
        any_server.interrupt()
        steps = len(page.steps)
        with pytest.raises(ExecutionInterrupted, match=SAMPLER):
            any_server.wait(prompt_id, timeout=60)
        assert len(page.steps) - steps <= 2  # one that was being made, and one whose message was on its way
        assert Image.open(io.BytesIO(page.previews[-1])).size == (512, 512)
    any_graph.inputs(SAMPLER)["steps"] = 3
    any_server.run(any_graph)


class Page:
    """What a browser hears while it is open: the sampler's steps, and the pictures shown on the way."""

    client_id = "page"

    def __init__(self, server: ComfyServer) -> None:
        self.steps: list[int] = []
        self.previews: list[bytes] = []
        self._socket = websocket.create_connection(
            f"{server.address.replace('http', 'ws')}/ws?clientId={self.client_id}", timeout=0.5
        )
        self._open = True
        self._thread = threading.Thread(target=self._listen, daemon=True)

    def __enter__(self) -> Page:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._open = False
        self._thread.join()
        self._socket.close()

    def wait_for_steps(self, count: int) -> None:
        deadline = time.monotonic() + 120
        while len(self.steps) < count:
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def _listen(self) -> None:
        while self._open:
            with contextlib.suppress(websocket.WebSocketTimeoutException):
                message = self._socket.recv()
                if isinstance(message, bytes):
                    start = message.find(b"\xff\xd8")  # where a JPEG begins, behind the message's header
                    self.previews += [message[start:]] if start >= 0 else []
                elif json.loads(message)["type"] == "progress":
                    self.steps.append(json.loads(message)["data"]["value"])
