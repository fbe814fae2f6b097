"""Base models from a diffusers folder and from single files: the same weights arrive, damage is told."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import untrained_tiny
from diffusers import CogVideoXPipeline
from safetensors.torch import save_file

from mm_core.errors import CheckpointError
from mm_core.pipelines import single_file, tiny
from mm_core.pipelines.base import FolderBase, TinyBase
from mm_core.pipelines.presets import Preset
from mm_core.pipelines.single_file import FileBase

PARTS = ("text_encoder", "transformer", "vae")


@pytest.fixture(scope="module")
def original() -> CogVideoXPipeline:
    return untrained_tiny.build_base(torch.float32)


@pytest.fixture(scope="module")
def saved(original: CogVideoXPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases") / "CogVideoX-tiny"
    original.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / saved.name)


@pytest.fixture(params=[True, False], ids=["rotary", "sine table"])
def files(
    request: pytest.FixtureRequest, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FileBase]:
    """Single files of a model that is made to count as published."""
    config = tiny.TRANSFORMER | {"use_rotary_positional_embeddings": request.param}
    preset = Preset(repo="tiny", transformer=config, vae=tiny.VAE, scheduler=tiny.SCHEDULER)
    pipe = untrained_tiny.build_base(torch.float32)
    monkeypatch.setattr(single_file, "PRESETS", {"tiny": preset})
    single_file._expected.cache_clear()
    text_config = {k: v for k, v in pipe.text_encoder.config.to_dict().items() if k != "dtype"}
    monkeypatch.setattr(single_file, "T5_XXL", text_config)
    for part in PARTS:
        tensors = {key: tensor.clone() for key, tensor in getattr(pipe, part).state_dict().items()}
        tensors.pop("encoder.embed_tokens.weight", None)  # a copy of shared.weight, which published files leave out
        save_file(tensors, tmp_path / f"{part}.safetensors")
    yield FileBase(
        transformer=tmp_path / "transformer.safetensors",
        text_encoder=tmp_path / "text_encoder.safetensors",
        vae=tmp_path / "vae.safetensors",
        tokenizer_folder=saved / "tokenizer",
    )
    single_file._expected.cache_clear()


@pytest.mark.parametrize("package", ["sentencepiece", "google.protobuf"])
def test_what_the_tokenizer_needs_is_named(folder: Path, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "tokenizer" / "tokenizer.json").rename(folder / "tokenizer" / "spiece.model")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=package):
        _ = FolderBase(folder).tokenizer


def assert_same_weights(left: CogVideoXPipeline, right: CogVideoXPipeline) -> None:
    for part in PARTS:
        a, b = getattr(left, part).state_dict(), getattr(right, part).state_dict()
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a), part


def test_a_folder_gives_back_its_model(original: CogVideoXPipeline, folder: Path) -> None:
    model = FolderBase(folder)
    assert_same_weights(model.load(torch.float32), original)
    assert model.name == "CogVideoX-tiny"
    assert model.limits.max_frames == TinyBase().limits.max_frames
    assert model.tokenizer("a man").input_ids == original.tokenizer("a man").input_ids


def test_a_saved_pipeline_is_a_folder_again(original: CogVideoXPipeline, folder: Path, tmp_path: Path) -> None:
    FolderBase(folder).load(torch.float32).save_pretrained(tmp_path)
    assert_same_weights(FolderBase(tmp_path).load(torch.float32), original)


def test_a_folder_is_loaded_in_the_wanted_type(folder: Path) -> None:
    pipe = FolderBase(folder).load(torch.bfloat16)
    assert {p.dtype for part in (pipe.transformer, pipe.vae) for p in part.parameters()} == {torch.bfloat16}


def test_single_files_give_back_their_model(original: CogVideoXPipeline, files: FileBase) -> None:
    """Also the sine table of CogVideoX-2b, which is in no file; nothing stays on `meta`."""
    pipe = files.load(torch.float32)
    assert_same_weights(pipe, original)
    assert not [t for part in PARTS for t in getattr(pipe, part).buffers() if t.is_meta]
    small = dict(width=64, height=64, num_frames=1, num_inference_steps=1, max_sequence_length=tiny.TEXT_TOKENS)
    video = pipe("a man", **small, output_type="pt").frames
    assert torch.isfinite(video).all()


def test_a_file_of_another_model_is_refused(files: FileBase, tmp_path: Path) -> None:
    save_file({"model.diffusion_model.x": torch.zeros(1)}, tmp_path / "transformer.safetensors")
    with pytest.raises(CheckpointError, match="not those of tiny under diffusers' names"):
        _ = files.limits


def test_a_text_encoder_of_another_model_is_refused(files: FileBase, tmp_path: Path) -> None:
    save_file({"shared.weight": torch.zeros(3, 3)}, tmp_path / "text_encoder.safetensors")
    with pytest.raises(
        CheckpointError, match=r"text_encoder\.safetensors .* missing: .* of a wrong shape: shared\.weight"
    ):
        files.load(torch.float32)


def test_a_missing_folder_names_what_it_should_hold(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json.*model_index\.json, scheduler/"):
        _ = FolderBase(tmp_path / "nothing").limits


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "FluxTransformer2DModel"}, "holds a FluxTransformer2DModel"),
        ({"in_channels": 32}, "image-to-video"),
    ],
)
def test_a_folder_of_another_model_is_refused(folder: Path, change: dict[str, object], message: str) -> None:
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        _ = FolderBase(folder).transformer_config


def test_an_incomplete_folder_names_what_it_lacks(folder: Path) -> None:
    FolderBase(folder).check_complete()
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    (folder / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"lacks vae/diffusion_pytorch_model\.safetensors, tokenizer/spiece\.model"
    ):
        FolderBase(folder).check_complete()


def test_cut_off_weights_are_told(folder: Path) -> None:
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(CheckpointError, match=r"incomplete or damaged.*Download it again"):
        FolderBase(folder).load(torch.float32)
