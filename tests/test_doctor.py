"""The Model Doctor on folders of small real files; single files at full size, but empty on disk."""

from __future__ import annotations

import hashlib
import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch
import untrained_tiny
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny_folder
from torch import nn
from transformers import T5Config, T5EncoderModel

from mm_core import doctor
from mm_core.checkpoints.adapter_file import Trained, save_adapter
from mm_core.doctor import FOUND, MISSING, PROBLEM, Finding, add_hashes, find_models, report, verdict
from mm_core.errors import CheckpointError
from mm_core.folders import Folders
from mm_core.pipelines import base
from mm_core.pipelines.base import TinyBase
from mm_core.pipelines.presets import PRESETS, T5_XXL

VAE = "vae/diffusion_pytorch_model.safetensors"


def examine(models: Path) -> dict[str, Finding]:
    """What is found in ComfyUI's `models` folder, by name."""
    findings = find_models(Folders.in_comfyui(models))
    named = {finding.name: finding for finding in findings}
    assert len(named) == len(findings)
    return named


@pytest.fixture
def base_folder(tmp_path: Path) -> Path:
    """A small model in the place of a published one."""
    return save_tiny_folder("5b", tmp_path / "CogVideo" / "CogVideoX-5b")


def test_an_empty_folder_names_what_belongs_where(tmp_path: Path) -> None:
    named = examine(tmp_path)
    places = {
        "THUDM/CogVideoX-5b": "CogVideo/CogVideoX-5b",
        "THUDM/CogVideoX-2b": "CogVideo/CogVideoX-2b",
        "THUDM/CogVideoX1.5-5B": "CogVideo/CogVideoX1.5-5B",
        "t5xxl_fp16.safetensors": "text_encoders/t5xxl_fp16.safetensors",
        "cogvideox_vae.safetensors": "vae/cogvideox_vae.safetensors",
        "*.safetensors": "magic_mirror",
        "photomaker-v2.bin": "photomaker/photomaker-v2.bin",
        "buffalo_l": "insightface/models/buffalo_l",
        "antelopev2": "insightface/models/antelopev2",
        "buffalo_sc": "insightface/models/buffalo_sc",
    }
    assert {name: finding.path for name, finding in named.items() if name != "tiny"} == {
        name: tmp_path / place for name, place in places.items()
    }
    assert {named[name].state for name in places} == {MISSING}
    assert all(named[name].licence for name in places)
    assert all(named[name].link.startswith("https://") for name in places if name != "*.safetensors")
    assert not any(tmp_path.iterdir())


def test_kinds_without_folders_are_left_out() -> None:
    assert [finding.name for finding in find_models(Folders())] == ["tiny"]


def test_the_built_in_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (finding,) = find_models(Folders())
    assert finding.path / VAE in [file.path for file in finding.files]
    folder = save_tiny_folder("5b", tmp_path / "tiny")
    save_file({"x": torch.zeros(1)}, folder / "id_encoder.safetensors")
    monkeypatch.setattr(base, "TinyBase", partial(TinyBase, folder))
    (finding,) = find_models(Folders())
    assert (finding.state, len(finding.files)) == (FOUND, 5) and finding.licence.startswith("Apache-2.0")
    (folder / "adapter.safetensors").unlink()
    (finding,) = find_models(Folders())
    assert (finding.state, len(finding.files)) == (PROBLEM, 4)
    assert "lacks adapter.safetensors. Install the node pack again" in finding.problem


def test_a_base_model(base_folder: Path, tmp_path: Path) -> None:
    save_tiny_folder("2b", tmp_path / "diffusers" / "THUDM" / "CogVideoX-2b")
    save_tiny_folder("5b", tmp_path / "CogVideo" / "somebody" / "small")
    named = examine(tmp_path)
    found = named["THUDM/CogVideoX-5b"]
    assert (found.state, found.path) == (FOUND, base_folder)
    assert found.size == sum(path.stat().st_size for path in base_folder.glob("*/*.safetensors"))
    assert "commercial use needs registration" in found.licence
    assert named["THUDM/CogVideoX-2b"].state == FOUND and named["THUDM/CogVideoX-2b"].licence == "Apache-2.0"
    assert (named["somebody/small"].state, named["somebody/small"].link) == (FOUND, "")
    assert named["THUDM/CogVideoX1.5-5B"].state == MISSING


def test_a_base_model_that_cannot_be_used(base_folder: Path, tmp_path: Path) -> None:
    name = "THUDM/CogVideoX-5b"
    config = base_folder / "transformer" / "config.json"
    original = json.loads(config.read_text())
    config.write_text(json.dumps(original | {"in_channels": 32}))
    assert "image-to-video" in examine(tmp_path)[name].problem
    config.write_text("{")
    assert "config.json is damaged, it is no JSON" in examine(tmp_path)[name].problem
    config.write_text(json.dumps(original))
    (base_folder / VAE).write_bytes((base_folder / VAE).read_bytes()[:1000])
    assert "cut short: diffusion_pytorch_model.safetensors (1,000 bytes)" in examine(tmp_path)[name].problem
    (base_folder / VAE).unlink()
    finding = examine(tmp_path)[name]
    assert finding.state == PROBLEM and f"lacks {VAE}. Download it again" in finding.problem


def test_a_folder_of_other_software_is_no_problem(tmp_path: Path) -> None:
    folder = tmp_path / "diffusers" / "flux" / "transformer"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    assert "flux" not in examine(tmp_path)
    (folder / "config.json").write_text("{}")
    assert examine(tmp_path)["flux"].state == PROBLEM


def empty_file(path: Path, model: nn.Module) -> Path:
    """A `.safetensors` file of a model on `meta`: its header is real, its weights are a hole."""
    header, end = {}, 0
    for key, tensor in model.state_dict().items():
        start, end = end, end + 2 * tensor.numel()
        header[key] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


def test_single_files_are_known_by_their_tensors(tmp_path: Path) -> None:
    preset = PRESETS["CogVideoX-2b"]
    with torch.device("meta"):
        transformer = CogVideoXTransformer3DModel(**preset.transformer)
        vae = AutoencoderKLCogVideoX(**preset.vae)
        text_encoder = T5EncoderModel(T5Config(**T5_XXL))
    empty_file(tmp_path / "unet" / "deep" / "a.safetensors", transformer)
    empty_file(tmp_path / "clip" / "b.safetensors", text_encoder)
    empty_file(tmp_path / "vae" / "c.safetensors", vae)
    empty_file(tmp_path / "vae" / "other.safetensors", nn.Linear(2, 2, device="meta"))
    named = examine(tmp_path)
    found = {name: named[f"{name}.safetensors"] for name in "abc"}
    assert {name: (finding.state, finding.detail) for name, finding in found.items()} == {
        "a": (FOUND, "THUDM/CogVideoX-2b"),
        "b": (FOUND, "T5-v1.1-XXL"),
        "c": (FOUND, "CogVideoX's VAE"),
    }
    assert found["a"].size == (tmp_path / "unet" / "deep" / "a.safetensors").stat().st_size
    assert not {"other.safetensors", "t5xxl_fp16.safetensors", "cogvideox_vae.safetensors"} & named.keys()


def test_a_single_file_that_is_meant_to_be_one(tmp_path: Path) -> None:
    """Known by its name, and not by its tensors: said to be of no use, with the remedy."""
    (tmp_path / "text_encoders").mkdir()
    (tmp_path / "text_encoders" / "t5xxl_fp16.safetensors").write_bytes(b"half")
    empty_file(tmp_path / "diffusion_models" / "CogVideoX_5b.safetensors", nn.Linear(2, 2, device="meta"))
    named = examine(tmp_path)
    assert "cut short: t5xxl_fp16.safetensors (4 bytes)" in named["t5xxl_fp16.safetensors"].problem
    assert "under diffusers' names" in named["CogVideoX_5b.safetensors"].problem


def test_adapters(tmp_path: Path) -> None:
    folder = tmp_path / "magic_mirror"
    trained = Trained(stage="video", steps=8000, data="some clips")
    adapter = untrained_tiny.build_adapter(torch.float32)
    save_adapter(adapter, folder / "sub" / "mine.safetensors", base_model="tiny", trained=trained)
    content = (folder / "sub" / "mine.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(content[: len(content) // 2])
    save_file({"x": torch.zeros(1)}, folder / "lora.safetensors")
    named = examine(tmp_path)
    assert named["mine.safetensors"].state == FOUND
    assert named["mine.safetensors"].detail == "for tiny; trained: video stage, 8,000 steps, some clips"
    assert "cut.safetensors is damaged or cut short" in named["cut.safetensors"].problem
    assert "not a Magic Mirror adapter" in named["lora.safetensors"].problem
    assert "*.safetensors" not in named


def test_the_id_encoder(tmp_path: Path) -> None:
    path = tmp_path / "photomaker" / "photomaker-v2.bin"
    path.parent.mkdir()
    torch.save({"id_encoder": {"x": torch.zeros(1000)}}, path)
    (path.parent / "photomaker-v1.bin").write_bytes(b"another")
    named = examine(tmp_path)
    assert named[path.name].state == FOUND and "photomaker-v1.bin" not in named
    path.write_bytes(path.read_bytes()[:2000])
    assert "is cut short" in examine(tmp_path)[path.name].problem


def test_the_id_encoder_is_converted_once(tmp_path: Path) -> None:
    """Beside itself, wherever it is; a copy that is there is not written again; the .bin is kept."""
    folders = Folders(photomaker=(tmp_path / "here", tmp_path / "there"))
    assert doctor.convert(folders).startswith("NOTHING TO CONVERT")
    path = tmp_path / "there" / "deep" / "photomaker-v2.bin"
    path.parent.mkdir(parents=True)
    torch.save({"id_encoder": {"x": torch.arange(10.0)}}, path)
    (finding,) = (found for found in find_models(folders) if found.name == path.name)
    assert finding.state == FOUND and "a pickle; convert writes" in finding.detail
    assert doctor.convert(folders).startswith(f"CONVERTED: {path} into photomaker-v2.safetensors, ")
    copy = path.with_suffix(".safetensors")
    assert torch.equal(load_file(copy)["id_encoder.x"], torch.arange(10.0)) and path.is_file()
    named = {finding.name: finding for finding in find_models(folders)}
    assert named[copy.name].state == named[path.name].state == FOUND
    assert named[path.name].detail == "its .safetensors copy is used instead"
    before = copy.stat().st_mtime_ns
    assert doctor.convert(folders) == f"KEPT: {copy}"
    assert copy.stat().st_mtime_ns == before


def test_a_damaged_id_encoder_is_not_converted(tmp_path: Path) -> None:
    path = tmp_path / "photomaker-v2.bin"
    torch.save({"id_encoder": {"x": torch.zeros(1000)}}, path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match=r"photomaker-v2\.bin is damaged, cut short"):
        doctor.convert(Folders(photomaker=(tmp_path,)))
    assert list(tmp_path.iterdir()) == [path]


def test_face_packs(tmp_path: Path) -> None:
    packs = tmp_path / "insightface" / "models"
    for name in ("buffalo_l/det_10g", "buffalo_l/w600k_r50", "antelopev2/antelopev2/glintr100", "mine/a", "mine/b"):
        (packs / name).parent.mkdir(parents=True, exist_ok=True)
        (packs / f"{name}.onnx").write_bytes(b"12345")
    named = examine(tmp_path)
    assert (named["buffalo_l"].state, named["buffalo_l"].size) == (FOUND, 10)
    assert "glintr100.onnx only" in named["antelopev2"].problem
    assert named["buffalo_sc"].state == MISSING
    assert named["mine"].state == FOUND
    assert "non-commercial" in named["buffalo_l"].licence


def test_hashes_are_compared_with_the_published_ones(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One file is as published, one is another, of the third nothing is known."""
    digests = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in base_folder.glob("*/*.safetensors")}
    name = "THUDM/CogVideoX-5b"
    weights = "transformer/diffusion_pytorch_model.safetensors"
    monkeypatch.setitem(doctor.PUBLISHED_SHA256, f"{name}/{VAE}", digests[base_folder / VAE])
    monkeypatch.setitem(doctor.PUBLISHED_SHA256, f"{name}/{weights}", "0" * 64)
    before = examine(tmp_path)[name]
    assert before.state == FOUND and {file.sha256 for file in before.files} == {None}

    done: list[int] = []
    (after,) = add_hashes([before], done.append)
    assert {file.path: file.sha256 for file in after.files} == digests
    assert done == sorted(done) and done[-1] == before.size
    assert [file.path for file in after.files if file.differs] == [base_folder / weights]
    assert after.state == PROBLEM
    text = report([after])
    assert f"{digests[base_folder / VAE]} (as published)" in text
    assert f"{digests[base_folder / weights]} (NOT the published file, {'0' * 64})" in text
    assert "(no published hash is known here)" in text


def test_the_report(base_folder: Path, tmp_path: Path) -> None:
    named = examine(tmp_path)
    text = report([named["THUDM/CogVideoX-5b"], named["photomaker-v2.bin"]]).splitlines()
    missing, found = 0, text.index(f"    at {base_folder}") - 1
    assert text[missing] == "MISSING: ID encoder photomaker-v2.bin"
    assert re.fullmatch(r"FOUND: base model THUDM/CogVideoX-5b, \d+\.\d\d (kB|MB)", text[found])
    assert text[missing + 1 : missing + 4] == [
        f"    belongs into {tmp_path / 'photomaker' / 'photomaker-v2.bin'}",
        "    from https://huggingface.co/TencentARC/PhotoMaker-V2",
        "    licence: Apache-2.0, as its page says",
    ]
    assert text[-1].startswith("1 found, 1 missing, 0 with a problem.")


def test_the_verdict_comes_first(base_folder: Path, tmp_path: Path) -> None:
    """What can run, and what a model lacks; missing models are listed before those that are there."""
    findings = find_models(Folders.in_comfyui(tmp_path))
    tiny, *others = verdict(findings).splitlines()
    assert tiny == "tiny can run. For photos it lacks a face pack; the example person needs none."
    assert others[0] == "THUDM/CogVideoX-5b lacks an adapter (none is published), the ID encoder, a face pack."
    assert verdict(findings, "THUDM/CogVideoX-2b").splitlines()[0].startswith("THUDM/CogVideoX-2b lacks")
    states = [line.split(":")[0] for line in report(findings).splitlines() if line[:1].isupper()]
    assert states.index("FOUND") > states.index("MISSING")


def test_two_builds_of_opencv_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    both = {"cv2": ["opencv-python", "opencv-contrib-python"]}
    monkeypatch.setattr("importlib.metadata.packages_distributions", lambda: both)
    assert "--force-reinstall --no-deps opencv-contrib-python" in verdict([], "tiny")
    both["cv2"].remove("opencv-python")
    assert "opencv" not in verdict([], "tiny")
