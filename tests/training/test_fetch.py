"""What a config names is fetched once the licences are accepted, from a hub that is a server on this machine."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants
from tiny_models import save_tiny_folder

from mm_core.checkpoints.photomaker import FILE_NAME, REPO
from mm_core.errors import CheckpointError, MagicMirrorError
from mm_core.pipelines import named
from mm_core.pipelines.named import base_of
from mm_core.release import fetch as module
from mm_core.release.commands import main
from mm_core.training.config import TrainingConfig, load_config
from mm_core.training.sources import id_encoder_of

RECIPE = Path(__file__).parents[2] / "mm_core" / "training" / "configs" / "cogvideox_5b.yaml"
BASE, WEIGHTS = "THUDM/CogVideoX-5b", "transformer/diffusion_pytorch_model.safetensors"
COMMIT, CHUNK = "c" * 40, 1024


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as `huggingface_hub` asks for."""

    files: dict[str, dict[str, bytes]]
    cut: str | None
    """A file whose first answer ends in the middle."""
    asked: list[tuple[str, str | None]]
    """Files and the part of them that was asked for."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        if self.path.startswith("/api/models/"):
            repo = "/".join(self.path.split("/")[3:5])
            tree = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in self.files[repo].items()
            ]
            info = {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": name} for name in self.files[repo]]}
            content = json.dumps(tree if "/tree/" in self.path else info).encode()
            self._send(200, content, {"Content-Type": "application/json"}, body)
            return
        repo, _, place = self.path.lstrip("/").partition("/resolve/")
        name = place.partition("/")[2]
        content = self.files.get(repo, {}).get(name)
        if content is None:
            self._send(404, b"", {}, body)
            return
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        part, status = self.headers.get("Range"), 200
        if body:
            self.asked.append((name, part))
        if body and part:
            first = int(part.removeprefix("bytes=").rstrip("-"))
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
            content, status = content[first:], 206
        self._send(status, content, headers, body, half=body and not part and name == self.cut)

    def _send(self, status: int, content: bytes, headers: dict[str, str], body: bool, half: bool = False) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content[: len(content) // 2] if half else content)
        self.close_connection |= half

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """With a small base under the 5B model's name, and an ID encoder that nobody opens."""
    folder = save_tiny_folder("5b", tmp_path / "published")
    base = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    class Served(Hub):
        files, cut, asked = {BASE: base, REPO: {FILE_NAME: b"weights"}}, None, []

    server = ThreadingHTTPServer(("127.0.0.1", 0), Served)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", CHUNK)  # 10 MB: what is written at a time
    for place in (module, named):
        monkeypatch.setattr(place, "DOWNLOADS", tmp_path / "models")
    digests = {f"{BASE}/{name}": hashlib.sha256(content).hexdigest() for name, content in base.items()}
    monkeypatch.setattr(module, "PUBLISHED_SHA256", digests | {FILE_NAME: hashlib.sha256(b"weights").hexdigest()})
    yield Served
    server.shutdown()
    server.server_close()


@pytest.fixture
def config(insightface_root: Path) -> TrainingConfig:
    return load_config(RECIPE, {"insightface_root": str(insightface_root), "face_pack": "buffalo_sc"})


def test_nothing_is_fetched_without_consent(
    hub: type[Hub], insightface_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    faces = [f"insightface_root={insightface_root}", "face_pack=buffalo_sc"]
    assert main(["fetch", "--config", str(RECIPE), "--set", *faces]) == 2
    told = capsys.readouterr().err
    assert all(name in told for name in (BASE, REPO, str(tmp_path / "models"), "--accept-licences"))
    assert "buffalo_sc" not in told and not (tmp_path / "models").exists()  # that one is there


def test_what_was_cut_off_goes_on(hub: type[Hub], config: TrainingConfig, tmp_path: Path) -> None:
    """And the published names of the recipe then mean what was fetched, to every command."""
    with pytest.raises(CheckpointError, match="training fetch"):
        base_of(config.base)
    hub.cut = WEIGHTS
    module.fetch(config, accepted=True)
    received = len(hub.files[BASE][WEIGHTS]) // 2 // CHUNK * CHUNK
    assert [part for part in hub.asked if part[1]] == [(WEIGHTS, f"bytes={received}-")]
    folder = tmp_path / "models" / "CogVideoX-5b"
    assert (folder / WEIGHTS).read_bytes() == hub.files[BASE][WEIGHTS]
    assert base_of(config.base).name == folder.name and id_encoder_of(config).read_bytes() == b"weights"
    hub.asked.clear()
    (folder / "vae" / "config.json").unlink()
    module.fetch(config, accepted=True)
    assert hub.asked == [("vae/config.json", None)]  # what is whole stays


def test_another_file_than_the_published_is_told(hub: type[Hub], config: TrainingConfig) -> None:
    """Each time, until it is removed."""
    hub.files[REPO][FILE_NAME] = b"others"
    for _ in range(2):
        with pytest.raises(MagicMirrorError, match=rf"{FILE_NAME} has the SHA-256 .* Remove it and run this again"):
            module.fetch(config, accepted=True)
