"""LoRAs as trainers write them act on a clip as a change of the base's weights would, and on no other clip."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from lora_files import ALPHA, NAMINGS, RANK, TARGETS, write_loras
from safetensors.torch import load_file, save_file
from tiny_models import PROMPT_TOKENS, TRANSFORMERS, assert_near, build_identity, noise
from torch import Tensor

from mm_core.checkpoints.lora_file import open_lora
from mm_core.checkpoints.lora_keys import layer_shapes
from mm_core.errors import CheckpointError
from mm_core.pipelines.base import FolderBase
from mm_core.pipelines.clip import ClipSettings
from mm_core.pipelines.lora import Lora
from mm_core.pipelines.magic_mirror import MagicMirror
from mm_core.pipelines.presets import PRESETS
from mm_core.pipelines.tiny import TRANSFORMER

SIZES = TRANSFORMERS["5b"] | dict(max_text_seq_length=PROMPT_TOKENS)
SHAPES = layer_shapes(SIZES)
CLIP = ClipSettings(prompt="a man img reading", width=48, height=32, num_frames=9, steps=2)


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    return write_loras(tmp_path_factory.mktemp("loras"), SIZES)


def opened(path: Path, strength: float = 1.0) -> Lora:
    return Lora(file=open_lora(path, SHAPES), strength=strength)


def sample(mirror: MagicMirror, *loras: Lora, identity: bool = True) -> Tensor:
    return mirror.sample(CLIP, build_identity() if identity else None, loras=loras)


@pytest.fixture(scope="module")
def plain(mirror: MagicMirror) -> Tensor:
    """The clip without a LoRA."""
    return sample(mirror)


@pytest.fixture(scope="module")
def expected(folders: Mapping[str, Path], loras: Mapping[str, Path]) -> dict[bool, Tensor]:
    """The clip of a base whose own weights have the change in them, with the identity and without."""
    folder = folders["5b"]
    merged = MagicMirror(FolderBase(folder), adapter=folder / "adapter.safetensors", device=torch.device("cpu"))
    weights = load_file(loras["without prefix"])
    with torch.no_grad():
        for key, down in weights.items():
            if ".lora_A." in key:
                layer = key.removesuffix(".lora_A.weight")
                change = ALPHA / RANK * weights[f"{layer}.lora_B.weight"] @ down
                merged.pipeline.transformer.get_parameter(f"{layer}.weight").add_(change)
    return {identity: sample(merged, identity=identity) for identity in (True, False)}


@pytest.mark.parametrize("naming", NAMINGS)
def test_namings(
    mirror: MagicMirror, loras: Mapping[str, Path], plain: Tensor, expected: dict[bool, Tensor], naming: str
) -> None:
    """Every naming is the same change of the clip; the next clip without the LoRA is as if there had been none."""
    lora = opened(loras[naming])
    layers = len(TARGETS) - 1
    assert len(lora.file.keys) == layers * SIZES["num_layers"] + 1
    assert_near(sample(mirror, lora), expected[True], 1e-4)
    assert (expected[True] - plain).norm() / plain.norm() > 0.1
    assert torch.equal(sample(mirror), plain)


def test_without_an_identity(mirror: MagicMirror, loras: Mapping[str, Path], expected: dict[bool, Tensor]) -> None:
    assert_near(sample(mirror, opened(loras["kohya"]), identity=False), expected[False], 1e-4)


def test_strengths_add_up(mirror: MagicMirror, loras: Mapping[str, Path], plain: Tensor, expected: dict) -> None:
    """Several LoRAs act together, the same one twice too, and one takes away what another gives."""
    first, second = loras["kohya"], loras["diffusers"]
    assert_near(sample(mirror, opened(first, 0.25), opened(second, 0.75)), expected[True], 1e-4)
    assert_near(sample(mirror, opened(first), opened(second, -1.0)), plain, 1e-4)
    assert torch.equal(sample(mirror), plain)


def test_fp8(folders: Mapping[str, Path], loras: Mapping[str, Path]) -> None:
    """On a base stored as 8-bit floats the LoRA keeps its own precision: its change is the same as elsewhere."""
    folder, changes = folders["5b"], []
    for precision in ("fp8", "fp32"):
        mirror = MagicMirror(FolderBase(folder), precision=precision, device=torch.device("cpu"))
        plain = sample(mirror, identity=False)
        changed = sample(mirror, opened(loras["kohya"]), identity=False)
        layer = mirror.pipeline.transformer.transformer_blocks[0].attn1.to_q
        assert layer.weight.dtype == (torch.float8_e4m3fn if precision == "fp8" else torch.float32)
        weights = load_file(loras["without prefix"])
        assert torch.equal(
            layer.lora_A["magic_mirror"].weight, weights["transformer_blocks.0.attn1.to_q.lora_A.weight"]
        )
        assert torch.equal(sample(mirror, identity=False), plain)
        changes.append((changed - plain).flatten())
    assert torch.nn.functional.cosine_similarity(*changes, dim=0) > 0.9


@pytest.mark.parametrize("name", [*PRESETS, "tiny"])
def test_layers_are_those_of_diffusers(name: str) -> None:
    """The table of layers and shapes is the real transformer's, at full size."""
    config = PRESETS[name].transformer if name in PRESETS else TRANSFORMER
    with torch.device("meta"):
        transformer = CogVideoXTransformer3DModel(**config)
    layers = {
        layer: tuple(module.weight.shape)
        for layer, module in transformer.named_modules()
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))
    }
    assert layer_shapes(transformer.config) == layers
    assert layer_shapes(config) == layers


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 1.0),
        ({"lora_alpha": 6}, 2.0),
        ({"lora_alpha": 6, "use_rslora": True}, 6 / 3**0.5),
        ({"lora_alpha": 6, "alpha_pattern": {"to_q": 9}}, 3.0),
        ({"lora_alpha": 6, "alpha_pattern": {"blocks.1.attn1.to_q": 9}}, 2.0),
    ],
)
def test_scales(tmp_path: Path, config: dict, scale: float) -> None:
    """Where the layers tell no alpha, peft's description of the training does, as peft itself reads it."""
    save_file(layer("transformer_blocks.0.attn1.to_q"), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (found,) = open_lora(tmp_path / "adapter_model.safetensors", SHAPES).read().values()
    assert found.scale == pytest.approx(scale)


def layer(name: str, wide: int = 32, tall: int = 32) -> dict[str, Tensor]:
    return {f"{name}.lora_A.weight": noise(RANK, wide), f"{name}.lora_B.weight": noise(tall, RANK)}


@pytest.mark.parametrize(
    "config", [{"lora_alpha": "6"}, {"lora_alpha": 6, "alpha_pattern": {"(to|q)+_.": 9}}], ids=["text", "pattern"]
)
def test_a_scale_that_cannot_be_read(tmp_path: Path, config: dict) -> None:
    save_file(layer("transformer_blocks.0.attn1.to_q"), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="alpha"):
        open_lora(tmp_path / "adapter_model.safetensors", SHAPES).read()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (layer("lora_unet_double_blocks_0_img_attn_qkv"), r"is no LoRA of CogVideoX: none of its 2 tensors .*double"),
        (layer("transformer.transformer_blocks.0.attn1.to_q", 48, 48), r"\(48, 48\) instead of \(32, 32\)"),
        (layer("transformer_blocks.0.attn1.to_q") | layer("transformer_blocks.5.attn1.to_q"), "has 2 tensors, of 4"),
        (layer("transformer_blocks.0.attn1.to_q") | layer("blocks.0.q"), "has 2 tensors, of 4"),
        ({"blocks.0.q.lora_down.weight": noise(3, 32)}, "one of two matrices is missing"),
        (layer("blocks.0.q") | {"blocks.0.q.alpha": noise(2)}, "alpha is not one number"),
        (layer("transformer_blocks.0.attn1.to_q") | {"transformer_blocks.0.attn1.to_q.dora_scale": noise(32)}, "DoRA"),
    ],
    ids=["another model", "another size", "more blocks", "twice", "half", "alpha", "DoRA"],
)
def test_refused(tmp_path: Path, tensors: dict[str, Tensor], message: str) -> None:
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=message):
        open_lora(tmp_path / "other.safetensors", SHAPES)


@pytest.mark.parametrize(
    ("change", "message"),
    [(lambda x: x.index_fill(1, torch.tensor([2]), torch.nan), "no numbers"), (Tensor.int, "not a floating-point")],
    ids=["NaN", "whole numbers"],
)
def test_matrices_that_are_no_numbers(tmp_path: Path, change: Callable[[Tensor], Tensor], message: str) -> None:
    matrices = layer("transformer_blocks.0.attn1.to_q")
    matrices["transformer_blocks.0.attn1.to_q.lora_B.weight"] = change(noise(32, RANK))
    save_file(matrices, tmp_path / "bad.safetensors")
    with pytest.raises(CheckpointError, match=rf"{message}.*lora_B|lora_B.*{message}"):
        open_lora(tmp_path / "bad.safetensors", SHAPES).read()


def test_a_text_encoders_layers_are_left_out(tmp_path: Path) -> None:
    """VideoX-Fun's trainer may write layers of T5 as well, which stays as it is."""
    transformer, text_encoder = "lora_unet__transformer_blocks_0_attn1_to_q", "lora_te_encoder_block_0_layer_0_q"
    save_file(layer(transformer) | layer(text_encoder), tmp_path / "both.safetensors")
    assert list(open_lora(tmp_path / "both.safetensors", SHAPES).keys) == ["transformer_blocks.0.attn1.to_q"]
