"""Photo and prompt to video on the current ComfyUI."""

from __future__ import annotations

import io
import json
import re
import shutil
import time
import wave
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
import untrained_tiny
from comfy_server import ComfyServer
from PIL import Image
from safetensors.torch import load_file

from mm_core.checkpoints.adapter_file import Trained, read_header, save_adapter
from mm_core.faces.analysis import FaceAnalyzer
from mm_core.faces.references import analyse_references
from mm_core.picture_file import read_image
from mm_core.pipelines.base import TinyBase
from mm_core.pipelines.clip import ClipSettings
from mm_core.pipelines.control import AdapterSettings
from mm_core.pipelines.magic_mirror import MagicMirror

SAMPLER, LOADER = "MagicMirrorCogVideoXSampler", "MagicMirrorLoader"
EXTRACT, APPLY, COMBINE = "MagicMirrorExtractFaceEmbedding", "MagicMirrorApplyCANAdapter", "MagicMirrorVideoCombine"
UNTRAINED = "tiny: UNTRAINED weights: the result will not resemble anybody"
TRAINED = f"tiny: {read_header(TinyBase().adapter).trained}"
CANVAS = {"nodes": [], "links": [], "version": 0.4}

Run = Callable[..., np.ndarray]


def forget(server: ComfyServer) -> None:
    """Make ComfyUI drop models and results; it does so between two workflows, a moment after it is asked."""
    server.free()
    time.sleep(1)


@pytest.mark.parametrize("format", ["webp", "gif"])
def test_an_animated_picture(
    server: ComfyServer,
    graph: Any,
    format: str,
    saved: Callable[..., dict[str, str]],
    decode: Callable[..., np.ndarray],
    queue: Callable[..., str],
) -> None:
    graph.inputs(COMBINE)["format"] = format
    entry = server.wait(queue(server, graph, extra_data={"extra_pnginfo": {"workflow": CANVAS}}))
    content = server.view(**saved(entry, graph))
    assert entry["outputs"][graph.id(COMBINE)]["animated"] == [True]
    assert decode(content).shape == (9, 64, 64, 3)
    if format == "webp":
        exif = Image.open(io.BytesIO(content)).getexif()
        assert exif[0x010F] == f"workflow:{json.dumps(CANVAS)}" and exif[0x0110].startswith("prompt:")
    else:
        file = saved(entry, graph)
        beside = Image.open(io.BytesIO(server.view(**file | {"filename": Path(file["filename"]).stem + ".png"})))
        assert json.loads(beside.text["workflow"]) == CANVAS and beside.size == (64, 64)


def test_metadata_is_left_out_on_request(server: ComfyServer, graph: Any, saved: Callable[..., dict[str, str]]) -> None:
    graph.inputs(COMBINE)["save_metadata"] = False
    with av.open(io.BytesIO(server.view(**saved(server.run(graph), graph)))) as container:
        assert not {"prompt", "workflow"} & {key.lower() for key in container.metadata}


def test_what_the_nodes_show(server: ComfyServer, graph: Any) -> None:
    forget(server)
    outputs = server.run(graph)["outputs"]
    assert outputs[graph.id(LOADER)]["text"] == [TRAINED]
    assert outputs[graph.id(SAMPLER)]["text"][0].splitlines()[0] == TRAINED
    photo, caution = outputs[graph.id(EXTRACT)]["text"][0].splitlines()
    assert caution.startswith("tiny knows rendered people only")
    assert photo.startswith("photo 1: face 411 px across")
    assert len(outputs[graph.id(EXTRACT)]["images"]) == 2  # the photo with its face framed, the crop


def test_the_face_picker_runs_alone(
    server: ComfyServer, graph: Any, portrait: Callable[..., Path], tmp_path: Path
) -> None:
    """A photo on its head, cut out: turned, and the framed photo is shown whether or not anything comes after."""
    photo = Image.open(portrait("person_b_2")).rotate(180)
    photo.putalpha(Image.new("L", photo.size, 255).point(lambda _: 255))
    photo.paste((255, 0, 0, 0), (0, photo.height - 40, photo.width, photo.height))
    photo.save(tmp_path / "cut_out.png")
    load = graph.id("LoadImage")
    graph[load]["inputs"]["image"] = server.upload_image(tmp_path / "cut_out.png")
    graph.inputs(EXTRACT)["mask"] = [load, 1]
    for later in set(graph) - {load, graph.id(LOADER), graph.id(EXTRACT)}:
        del graph[later]
    for _ in range(2):  # the second time from ComfyUI's cache
        shown = server.run(graph)["outputs"][graph.id(EXTRACT)]
        assert shown["text"][0].startswith("warning: photo 1: the photo was turned by 180 degrees")
        framed, _ = shown["images"]
        pixels = np.asarray(Image.open(io.BytesIO(server.view(**framed))))
        assert (pixels[2, 300, :3] == 128).all()  # grey where it was transparent, now at the top
    assert not re.search(r"\wWarning: ", server.log_text())  # of NumPy or scikit-image


def test_untrained_weights_say_so(server: ComfyServer, graph: Any) -> None:
    path = server.base / "models" / "magic_mirror" / "noise.safetensors"
    untrained = Trained(stage="untrained", steps=0, data="seeded noise")
    save_adapter(untrained_tiny.build_adapter(torch.float32), path, base_model="tiny", trained=untrained)
    graph.inputs(LOADER)["adapter"] = path.name
    outputs = server.run(graph)["outputs"]
    path.unlink()
    assert outputs[graph.id(LOADER)]["text"] == [UNTRAINED]
    assert outputs[graph.id(SAMPLER)]["text"][0].startswith(UNTRAINED)
    assert f"[WARNING] MagicMirror: {UNTRAINED}" in server.log_text()


def test_a_file_is_never_overwritten(server: ComfyServer, graph: Any, saved: Callable[..., dict[str, str]]) -> None:
    names = set()
    for quality in (10, 20, 30):
        graph.inputs(COMBINE)["quality"] = quality
        names.add(saved(server.run(graph), graph)["filename"])
    assert len(names) == 3


def test_the_same_as_the_core(
    server: ComfyServer, graph: Any, portrait: Callable[[str], Path], insightface_root: Path
) -> None:
    """Every setting of the nodes arrives where it belongs."""
    graph.inputs(EXTRACT).update(face="leftmost", crop="image")
    graph.inputs(APPLY).update(
        identity_scale=0.7, can_scale=1.3, ip_scale=0.9, start_percent=0.2, end_percent=0.8, identity_in_negative=True
    )
    graph.inputs(SAMPLER).update(
        prompt="A wizard img waves.", negative_prompt="blur", width=80, height=48, num_frames=9, steps=5,
        guidance_scale=4.5, dynamic_guidance=False, scheduler="ddim", seed=2**63 + 5,
    )  # fmt: skip
    graph.add("20", "SaveLatent", samples=[graph.id(SAMPLER), 1], filename_prefix="core")
    (file,) = server.run(graph)["outputs"]["20"]["latents"]
    found = load_file(server.base / "output" / file["filename"])["latent_tensor"]

    mirror = MagicMirror(TinyBase(), device=torch.device("cpu"))
    analyzer = FaceAnalyzer(insightface_root, "buffalo_sc", "cpu")
    photo = read_image(portrait("person_b_2"))
    identity = mirror.identity(analyse_references(analyzer, [photo], which="leftmost", crop="image"))
    clip = ClipSettings(
        prompt="A wizard img waves.", negative_prompt="blur", width=80, height=48, num_frames=9, steps=5,
        guidance_scale=4.5, dynamic_guidance=False, scheduler="ddim", seed=2**63 + 5,
    )  # fmt: skip
    settings = AdapterSettings(identity_scale=0.7, can_scale=1.3, ip_scale=0.9, start=0.2, end=0.8, in_negative=True)
    expected = mirror.sample(clip, identity, settings) / mirror.pipeline.vae.config.scaling_factor
    assert found.shape == expected.shape == (1, 16, 3, 12, 20)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_a_diffusers_folder(server: ComfyServer, graph: Any, run: Run) -> None:
    """The tiny model as a folder below models/CogVideo is offered, and makes the same clip."""
    folder = server.base / "models" / "CogVideo" / "somebody" / "small"
    shutil.copytree(TinyBase().folder, folder)
    choices = server.object_info(LOADER)["input"]["required"]["base_model"][1]["options"]
    assert "somebody/small" in choices
    graph.bypass_apply()
    built_in = run(server, graph.copy())
    graph.inputs(LOADER).update(base_model="somebody/small", adapter="none")
    assert np.array_equal(run(server, graph), built_in)


def test_several_photos_are_one_person(server: ComfyServer, graph: Any, portrait: Callable[[str], Path]) -> None:
    graph.add("20", "LoadImage", image=server.upload_image(portrait("person_b_1")))
    graph.inputs(EXTRACT)["image_3"] = ["20", 0]
    forget(server)
    shown = server.run(graph)["outputs"][graph.id(EXTRACT)]
    assert len(shown["images"]) == 4  # two photos, two crops
    assert shown["text"][0].count("similarity to the other photos 0.") == 2 and "warning" not in shown["text"][0]


def test_bypassed_and_switched_off_are_plain_cogvideox(server: ComfyServer, graph: Any, run: Run) -> None:
    with_identity = run(server, graph.copy())
    off = graph.copy()
    off.inputs(APPLY).update(identity_scale=0.0, can_scale=0.0, ip_scale=0.0)
    plain = graph.copy()
    plain.bypass_apply()
    assert np.array_equal(run(server, off), run(server, plain))
    assert not np.array_equal(with_identity, run(server, plain))


def test_one_identity_does_not_leak_into_the_next(
    server: ComfyServer, make_graph: Callable[..., Any], run: Run
) -> None:
    """A, then B on the same loaded model, is B on a fresh one."""
    a, b = make_graph(server, "person_a_2"), make_graph(server, "person_b_2")
    first = run(server, a)
    second = run(server, b)
    forget(server)
    assert np.array_equal(run(server, b), second)
    assert not np.array_equal(first, second)


@pytest.fixture
def tone(server: ComfyServer) -> Iterator[str]:
    """Five seconds of sound in the input folder."""
    path = server.base / "input" / "tone.wav"
    samples = (np.sin(np.arange(5 * 16000) * 2 * np.pi * 440 / 16000) * 20000).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(samples.tobytes())
    yield path.name
    path.unlink()


@pytest.mark.parametrize("format", ["mp4", "webm"])
def test_sound(server: ComfyServer, graph: Any, tone: str, format: str, saved: Callable[..., dict[str, str]]) -> None:
    graph.add("20", "LoadAudio", audio=tone)
    graph.inputs(COMBINE).update(format=format, audio=["20", 0])
    with av.open(io.BytesIO(server.view(**saved(server.run(graph), graph)))) as container:
        stream = container.streams.audio[0]
        seconds = sum(frame.samples for frame in container.decode(stream)) / stream.rate
    assert seconds == pytest.approx(9 / 8, abs=0.1)


def test_core_nodes_take_the_outputs(server: ComfyServer, graph: Any) -> None:
    graph.add("20", "SaveVideo", video=[graph.id(SAMPLER), 2], filename_prefix="core", format="auto", codec="auto")
    graph.add("21", "SaveVideo", video=[graph.id(COMBINE), 0], filename_prefix="core", format="auto", codec="auto")
    graph.add("22", "PreviewImage", images=[graph.id(EXTRACT), 1])
    outputs = server.run(graph)["outputs"]
    for key in ("20", "21"):
        (file,) = outputs[key]["images"]
        with av.open(io.BytesIO(server.view(**file))) as container:
            assert container.streams.video[0].average_rate == 8
