"""What users get wrong, and what ComfyUI tells them."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import untrained_tiny
from comfy_server import ComfyServer, ExecutionFailed, WorkflowRefused
from PIL import Image

from mm_core.checkpoints.adapter_file import Trained, save_adapter
from mm_core.models.adapter import MagicMirrorAdapter
from mm_core.models.config import AdapterConfig
from mm_core.pipelines import tiny

ROOT = Path(__file__).resolve().parents[2]
SAMPLER, LOADER = "MagicMirrorCogVideoXSampler", "MagicMirrorLoader"
EXTRACT, APPLY, COMBINE = "MagicMirrorExtractFaceEmbedding", "MagicMirrorApplyCANAdapter", "MagicMirrorVideoCombine"


def failure(server: ComfyServer, graph: Any) -> str:
    with pytest.raises((WorkflowRefused, ExecutionFailed)) as raised:
        server.run(graph)
    return str(raised.value)


@pytest.mark.parametrize(
    ("node", "changed", "says"),
    [
        (SAMPLER, {"num_frames": 8}, ["8 frames", "1 or 9"]),
        (SAMPLER, {"num_frames": 57}, ["57 frames", "1 (an image) to 9"]),
        (SAMPLER, {"width": 481}, ["481 px", "multiple of 8", "480"]),
        (SAMPLER, {"height": 4}, ["4 px", "multiple of 8"]),
        (SAMPLER, {"width": 720, "height": 480}, ["720 x 480 px is far beyond", "64 x 64"]),
        (SAMPLER, {"guidance_scale": float("nan")}, ["guidance_scale is nan"]),
        (SAMPLER, {"steps": -1}, ["steps", "smaller than min of 0"]),
        (SAMPLER, {"prompt": "A castle on a hill."}, ["PromptError", "names no person", "man, woman"]),
        (SAMPLER, {"prompt": "A man img and a woman img."}, ["PromptError", "2 times"]),
        (SAMPLER, {"prompt": "of the city, " * 120 + "a man img."}, ["PromptError", "48", "nearer to the beginning"]),
        (APPLY, {"can_scale": float("nan")}, ["SettingError", "can_scale is nan"]),
        (APPLY, {"ip_scale": 3.5}, ["ip_scale", "bigger than max of 3"]),
        (APPLY, {"start_percent": 0.8, "end_percent": 0.2}, ["SettingError", "0.8", "after end"]),
        (EXTRACT, {"face": "index", "face_index": 7}, ["FaceChoiceError", "face 7 does not exist", "photo 1"]),
        (LOADER, {"adapter": "gone.safetensors"}, ["CheckpointError", "gone.safetensors", "models/magic_mirror"]),
        (LOADER, {"adapter": "none"}, ["SettingError", "auto"]),
        (LOADER, {"id_encoder": "gone.bin"}, ["CheckpointError", "gone.bin", "models/photomaker"]),
        (LOADER, {"base_model": "gone", "adapter": "none"}, ["CheckpointError", "gone", "models/diffusion_models"]),
        (LOADER, {"face_pack": "antelopev2"}, ["CheckpointError", "insightface/models/antelopev2", "github.com"]),
        (
            LOADER,
            {"base_model": "THUDM/CogVideoX-5b", "adapter": "none"},
            ["models/CogVideo/CogVideoX-5b", "https://huggingface.co/THUDM/CogVideoX-5b", "allow_download"],
        ),
        (LOADER, {"base_model": "THUDM/CogVideoX-5b"}, ["Choose the adapter", "models/magic_mirror", "none"]),
        (COMBINE, {"format": "avi"}, ["'avi'; choose one of mp4, webm, webp, gif"]),
        (COMBINE, {"frame_rate": float("nan")}, ["frame rate is nan", "from 0.01 to 1000"]),
        (COMBINE, {"filename_prefix": "../outside"}, ["'../outside', which leads outside the folder", "output"]),
        (COMBINE, {"filename_prefix": "what?"}, ["'?', which Windows allows in no file name"]),
        (COMBINE, {"skip_first_frames": 5, "skip_last_frames": 4}, ["No frame is left of 9", "Leave out fewer"]),
    ],
)
def test_wrong_value(server: ComfyServer, graph: Any, node: str, changed: dict[str, Any], says: list[str]) -> None:
    graph.inputs(node).update(changed)
    message = failure(server, graph).replace("\\", "/")
    assert all(part in message for part in says), message


@pytest.fixture
def noise(server: ComfyServer, tmp_path: Path) -> str:
    """A picture without a face, in ComfyUI's input folder."""
    pixels = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "noise.png")
    return server.upload_image(tmp_path / "noise.png")


def test_no_face(server: ComfyServer, graph: Any, noise: str) -> None:
    graph.inputs("LoadImage")["image"] = noise
    message = failure(server, graph)
    assert "NoFaceError" in message and "photo 1 (256 x 256 px)" in message and "no face was found" in message


def test_no_face_may_mean_no_identity(
    server: ComfyServer, graph: Any, noise: str, run: Callable[..., np.ndarray]
) -> None:
    graph.inputs("LoadImage")["image"] = noise
    graph.inputs(EXTRACT)["on_no_face"] = "no identity"
    entry = server.run(graph)
    (report,) = entry["outputs"][graph.id(EXTRACT)]["text"]
    assert "NO IDENTITY" in report and "no face was found" in report
    plain = graph.copy()
    plain.bypass_apply()
    assert np.array_equal(run(server, graph), run(server, plain))


@pytest.fixture
def french(server: ComfyServer) -> Iterator[dict[str, str]]:
    """French as the page's language, as its settings store it; the French texts of errors."""
    set_language(server, "fr")
    yield json.loads((ROOT / "locales" / "fr" / "main.json").read_text(encoding="utf-8"))["magicMirror"]["errors"]
    set_language(server, "en")


def set_language(server: ComfyServer, language: str) -> None:
    address = f"{server.address}/settings/Comfy.Locale"
    urllib.request.urlopen(urllib.request.Request(address, data=json.dumps(language).encode())).close()


def test_errors_speak_the_pages_language(server: ComfyServer, graph: Any, noise: str, french: dict[str, str]) -> None:
    """Those of a running node, which the log has in English, and those found before anything runs."""
    graph.inputs("LoadImage")["image"] = noise
    message = failure(server, graph)
    assert "NoFaceError" in message and french["no_face"].format(photos="photo 1 (256 x 256 px)", limit=20) in message
    assert "MagicMirror: photo 1 (256 x 256 px): no face was found" in server.log_text()
    graph.inputs(SAMPLER)["num_frames"] = 8
    assert french["length_step"].format(frames=8, step=8, below=1, near=9) in failure(server, graph)


def test_an_unknown_language_is_english(server: ComfyServer, graph: Any, french: dict[str, str]) -> None:
    set_language(server, "../fr")
    graph.inputs(SAMPLER)["num_frames"] = 8
    assert "The clip has 8 frames" in failure(server, graph)


def test_photos_without_a_face_may_be_left_out(server: ComfyServer, graph: Any, noise: str) -> None:
    """The others are the person; with none left there is nobody to go on with."""
    photo = graph.id("LoadImage")
    graph.add("20", "LoadImage", image=noise)
    graph.inputs(EXTRACT).update(image_2=["20", 0], on_no_face="skip photo")
    shown = server.run(graph)["outputs"][graph.id(EXTRACT)]
    (report,) = shown["text"]
    assert report.startswith("warning: photo 2: LEFT OUT") and "\nphoto 1: face 411 px across" in report
    assert len(shown["images"]) == 3  # both photos, one crop
    graph[photo]["inputs"]["image"] = noise
    message = failure(server, graph)
    assert "NoFaceError" in message and "photo 1 (256 x 256 px), photo 2 (256 x 256 px): no face was found" in message


@pytest.fixture
def adapter_folder(server: ComfyServer) -> Path:
    folder = server.base / "models" / "magic_mirror"
    folder.mkdir(exist_ok=True)
    return folder


def write_adapter(path: Path, **transformer: int) -> None:
    """An adapter for a base like tiny, of other sizes."""
    sizes = {name: getattr(tiny.ADAPTER, name) for name in ("id_token_dim", "clip_hidden_size")}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        adapter = MagicMirrorAdapter(
            AdapterConfig.for_base(
                tiny.TRANSFORMER | transformer, id_proj_dim=64, can_hidden_dim=128, perceiver_dim=128,
                perceiver_depth=2, perceiver_dim_head=32, **sizes,
            )
        )  # fmt: skip
    save_adapter(adapter, path, base_model="other", trained=Trained(stage="image", steps=7, data="noise"))


def test_an_adapter_for_another_base(server: ComfyServer, graph: Any, adapter_folder: Path) -> None:
    write_adapter(adapter_folder / "deeper.safetensors", num_layers=10)
    graph.inputs(LOADER)["adapter"] = "deeper.safetensors"
    message = failure(server, graph)
    assert "MagicMirrorLoader" in message and "made for other, not for tiny" in message and "10 instead of 8" in message


def test_a_damaged_adapter(server: ComfyServer, graph: Any, adapter_folder: Path) -> None:
    write_adapter(adapter_folder / "cut.safetensors")
    content = (adapter_folder / "cut.safetensors").read_bytes()
    (adapter_folder / "cut.safetensors").write_bytes(content[: len(content) // 2])
    graph.inputs(LOADER)["adapter"] = "cut.safetensors"
    message = failure(server, graph)
    assert "MagicMirrorLoader" in message and "cut.safetensors is damaged" in message


def test_a_replaced_adapter_is_noticed(
    server: ComfyServer, graph: Any, adapter_folder: Path, run: Callable[..., np.ndarray]
) -> None:
    """The same name, another file: the loader runs again and the clip changes."""
    path = adapter_folder / "mine.safetensors"
    write_adapter(path)
    graph.inputs(LOADER)["adapter"] = "mine.safetensors"
    entry = server.run(graph)
    assert entry["outputs"][graph.id(LOADER)]["text"] == ["tiny: trained: image stage, 7 steps, noise"]
    assert graph.id(LOADER) in server.cached_nodes(server.run(graph))
    trained = Trained(stage="video", steps=8, data="b")
    save_adapter(untrained_tiny.build_adapter(torch.float32), path, base_model="tiny", trained=trained)
    entry = server.run(graph)
    assert entry["outputs"][graph.id(LOADER)]["text"] == ["tiny: trained: video stage, 8 steps, b"]


def test_a_half_downloaded_base(server: ComfyServer, graph: Any) -> None:
    folder = server.base / "models" / "CogVideo" / "half"
    (folder / "transformer").mkdir(parents=True, exist_ok=True)
    (folder / "transformer" / "config.json").write_text("{}", encoding="utf-8")
    graph.inputs(LOADER).update(base_model="half", adapter="none")
    message = failure(server, graph)
    assert "half is incomplete" in message and "text_encoder/model.safetensors" in message


def test_silent_formats_refuse_sound(server: ComfyServer, graph: Any) -> None:
    graph.add("20", "EmptyAudio", duration=1.0, sample_rate=16000, channels=1)
    graph.inputs(COMBINE).update(format="gif", audio=["20", 0])
    assert "holds no sound" in failure(server, graph)
