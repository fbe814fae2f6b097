"""The Model Doctor on a real ComfyUI."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from comfy_server import ComfyServer
from safetensors.torch import load_file

DOCTOR, LOADER = "MagicMirrorModelDoctor", "MagicMirrorLoader"


def examine(server: ComfyServer, **inputs: bool) -> tuple[str, dict[str, Any]]:
    """What the node shows, which is what it puts out; and the history record."""
    entry = server.run(
        {
            "1": {"class_type": DOCTOR, "inputs": inputs},
            "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}},
        }
    )
    (shown,) = entry["outputs"]["1"]["text"]
    assert entry["outputs"]["2"]["text"] == [shown]
    return shown, entry


def test_what_is_here_and_what_is_not(any_server: ComfyServer) -> None:
    report, _ = examine(any_server)
    models = any_server.base / "models"
    lines = report.splitlines()
    assert any(line.startswith("FOUND: face pack buffalo_sc, ") for line in lines)
    assert f"    at {models / 'insightface' / 'models' / 'buffalo_sc'}" in lines
    assert "MISSING: base model THUDM/CogVideoX-2b" in lines
    assert f"    belongs into {models / 'CogVideo' / 'CogVideoX-2b'}" in lines
    assert f"    belongs into {models / 'text_encoders' / 't5xxl_fp16.safetensors'}" in lines
    assert any("built-in model tiny" in line for line in lines)


def test_a_file_that_comes_and_goes(server: ComfyServer) -> None:
    """Nothing on the canvas changes, and the node runs again all the same."""
    path = server.base / "models" / "magic_mirror" / "doctored.safetensors"
    line = f"PROBLEM: adapter {path.name}, 7 bytes"
    assert line not in examine(server)[0]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"nothing")
    try:
        report, entry = examine(server)
    finally:
        path.unlink()
    assert line in report.splitlines() and "1" not in server.cached_nodes(entry)
    assert line in server.log_text()
    assert line not in examine(server)[0]


def test_hashes_on_request(server: ComfyServer, insightface_root: Path) -> None:
    content = (insightface_root / "models" / "buffalo_sc" / "w600k_mbf.onnx").read_bytes()
    line = f"w600k_mbf.onnx: SHA-256 {hashlib.sha256(content).hexdigest()}"
    assert line in examine(server, check_hashes=True)[0]
    assert "SHA-256" not in examine(server)[0]


def test_the_id_encoder_is_converted_on_request(any_server: ComfyServer) -> None:
    """Once, beside itself; the loader lists the copy first."""
    server, folder = any_server, any_server.base / "models" / "photomaker"
    folder.mkdir(exist_ok=True)
    pickled, copy = folder / "photomaker-v2.bin", folder / "photomaker-v2.safetensors"
    torch.save({"id_encoder": {"weight": torch.arange(4.0)}, "lora_weights": {"a": torch.ones(1)}}, pickled)
    try:
        assert "convert writes a .safetensors copy" in examine(server)[0] and not copy.exists()
        report = examine(server, convert=True)[0].splitlines()
        assert report[0].startswith(f"CONVERTED: {pickled} into {copy.name}, ")
        assert load_file(copy).keys() == {"id_encoder.weight", "lora_weights.a"} and pickled.is_file()
        assert examine(server, convert=True)[0].startswith(f"KEPT: {copy}\n")
        options = server.object_info(LOADER)["input"]["required"]["id_encoder"][1]["options"]
        assert options.index(copy.name) < options.index(pickled.name)
    finally:
        pickled.unlink()
        copy.unlink(missing_ok=True)
