"""The adapter file, format 1, as docs/checkpoint.md describes it."""

from __future__ import annotations

import json
import re
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import (
    TRANSFORMERS,
    assert_near,
    build_transformer,
    fill_with_noise,
    noise,
    transformer_inputs,
)
from torch import Tensor

from mm_core.checkpoints.adapter_file import Trained, load_adapter, read_header, save_adapter
from mm_core.checkpoints.safetensors_file import check_weight
from mm_core.errors import CheckpointError
from mm_core.hosts.cogvideox_diffusers import STATE, attach
from mm_core.models.adapter import MagicMirrorAdapter
from mm_core.models.config import AdapterConfig
from mm_core.pipelines.base import FolderBase
from mm_core.pipelines.magic_mirror import MagicMirror

CONFIG = {
    "hidden_size": 32,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 5,
    "time_embed_dim": 10,
    "text_embed_dim": 14,
    "adapted_layers": [0, 2],
    "id_token_dim": 12,
    "num_id_tokens": 2,
    "id_proj_dim": 9,
    "can_hidden_dim": 11,
    "clip_hidden_size": 6,
    "perceiver_dim": 8,
    "perceiver_depth": 1,
    "perceiver_dim_head": 4,
    "num_face_tokens": 3,
}
METADATA = {
    "format": "magicmirror-adapter",
    "format_version": "1",
    "base_model": "someone/CogVideoX-tiny",
    "config": json.dumps(CONFIG),
    "trained": json.dumps({"stage": "video", "steps": 5000, "data": "a few clips"}),
}
# Written by hand from docs/checkpoint.md, for the sizes above.
SHAPES = {
    "face_perceiver.query_tokens": (1, 3, 8),
    "face_perceiver.perceiver_resampler.proj_in.weight": (8, 6),
    "face_perceiver.perceiver_resampler.proj_in.bias": (8,),
    "face_perceiver.perceiver_resampler.layers.0.0.norm1.weight": (8,),
    "face_perceiver.perceiver_resampler.layers.0.0.norm1.bias": (8,),
    "face_perceiver.perceiver_resampler.layers.0.0.norm2.weight": (8,),
    "face_perceiver.perceiver_resampler.layers.0.0.norm2.bias": (8,),
    "face_perceiver.perceiver_resampler.layers.0.0.to_q.weight": (8, 8),
    "face_perceiver.perceiver_resampler.layers.0.0.to_kv.weight": (16, 8),
    "face_perceiver.perceiver_resampler.layers.0.0.to_out.weight": (8, 8),
    "face_perceiver.perceiver_resampler.layers.0.1.0.weight": (8,),
    "face_perceiver.perceiver_resampler.layers.0.1.0.bias": (8,),
    "face_perceiver.perceiver_resampler.layers.0.1.1.weight": (32, 8),
    "face_perceiver.perceiver_resampler.layers.0.1.3.weight": (8, 32),
    "face_perceiver.perceiver_resampler.proj_out.weight": (8, 8),
    "face_perceiver.perceiver_resampler.proj_out.bias": (8,),
    "face_perceiver.perceiver_resampler.norm_out.weight": (8,),
    "face_perceiver.perceiver_resampler.norm_out.bias": (8,),
    "face_proj.weight": (32, 8),
    "face_proj.bias": (32,),
    "id_fusion.mlp1.layernorm.weight": (26,),
    "id_fusion.mlp1.layernorm.bias": (26,),
    "id_fusion.mlp1.fc1.weight": (14, 26),
    "id_fusion.mlp1.fc1.bias": (14,),
    "id_fusion.mlp1.fc2.weight": (14, 14),
    "id_fusion.mlp1.fc2.bias": (14,),
    "id_fusion.mlp2.layernorm.weight": (14,),
    "id_fusion.mlp2.layernorm.bias": (14,),
    "id_fusion.mlp2.fc1.weight": (14, 14),
    "id_fusion.mlp2.fc1.bias": (14,),
    "id_fusion.mlp2.fc2.weight": (14, 14),
    "id_fusion.mlp2.fc2.bias": (14,),
    "id_proj.weight": (9, 24),
    "id_proj.bias": (9,),
    "blocks.0.face_norm1.weight": (32,),
    "blocks.0.face_norm1.bias": (32,),
    "blocks.0.face_norm2.weight": (32,),
    "blocks.0.face_norm2.bias": (32,),
    "blocks.0.face_modulation.linear_1.weight": (10, 10),
    "blocks.0.face_modulation.linear_1.bias": (10,),
    "blocks.0.face_modulation.linear_2.weight": (192, 10),
    "blocks.0.face_modulation.linear_2.bias": (192,),
    "blocks.0.can.linear_1.weight": (11, 51),
    "blocks.0.can.linear_1.bias": (11,),
    "blocks.0.can.linear_2.weight": (384, 11),
    "blocks.0.can.linear_2.bias": (384,),
    "blocks.0.attn.to_k_ip.weight": (32, 32),
    "blocks.0.attn.to_v_ip.weight": (32, 32),
    "blocks.0.attn.norm_k_ip.weight": (16,),
    "blocks.0.attn.norm_k_ip.bias": (16,),
    "blocks.2.face_norm1.weight": (32,),
    "blocks.2.face_norm1.bias": (32,),
    "blocks.2.face_norm2.weight": (32,),
    "blocks.2.face_norm2.bias": (32,),
    "blocks.2.face_modulation.linear_1.weight": (10, 10),
    "blocks.2.face_modulation.linear_1.bias": (10,),
    "blocks.2.face_modulation.linear_2.weight": (192, 10),
    "blocks.2.face_modulation.linear_2.bias": (192,),
    "blocks.2.can.linear_1.weight": (11, 51),
    "blocks.2.can.linear_1.bias": (11,),
    "blocks.2.can.linear_2.weight": (384, 11),
    "blocks.2.can.linear_2.bias": (384,),
    "blocks.2.attn.to_k_ip.weight": (32, 32),
    "blocks.2.attn.to_v_ip.weight": (32, 32),
    "blocks.2.attn.norm_k_ip.weight": (16,),
    "blocks.2.attn.norm_k_ip.bias": (16,),
}
TRAINED = Trained(stage="image", steps=3, data="two portraits")

Tensors = dict[str, Tensor]


def hand_written(dtype: torch.dtype = torch.float32) -> Tensors:
    """A checkpoint from the documented table alone."""
    return {key: (noise(*shape, seed=i) * 0.2).to(dtype) for i, (key, shape) in enumerate(SHAPES.items())}


def write(path: Path, tensors: Tensors | None = None, **metadata: str | None) -> Path:
    """A file as the page describes it, but for what is given; None leaves a metadata entry out."""
    entries = {key: value for key, value in (METADATA | metadata).items() if value is not None}
    save_file(hand_written() if tensors is None else tensors, path, metadata=entries)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "adapter.safetensors"


@pytest.fixture
def adapter() -> MagicMirrorAdapter:
    return fill_with_noise(MagicMirrorAdapter(AdapterConfig(**CONFIG)))


def test_hand_written_file_loads_and_works(path: Path) -> None:
    """A file made from the page alone loads with all its values and changes what a transformer gives."""
    tensors = hand_written()
    adapter, header = load_adapter(write(path))
    assert adapter.state_dict().keys() == tensors.keys()
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in adapter.state_dict().items())
    assert header.config.to_dict() == CONFIG
    assert (header.base_model, header.trained.stage, header.trained.steps) == ("someone/CogVideoX-tiny", "video", 5000)

    transformer = build_transformer("5b")
    inputs = transformer_inputs(transformer)
    plain = transformer(**inputs).sample
    attached = attach(transformer, adapter)
    state = attached.face_state(id_tokens=noise(1, 2, 12), face_tokens=noise(1, 3, 32), timestep=inputs["timestep"])
    adapted = transformer(**inputs, attention_kwargs={STATE: state}).sample
    assert adapted.isfinite().all()
    assert not torch.allclose(adapted, plain, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(adapter: MagicMirrorAdapter, path: Path, dtype: torch.dtype) -> None:
    """Saving writes the documented metadata and every bit of every tensor; loading gives them back."""
    adapter.to(dtype)
    save_adapter(adapter, path, base_model="a/b", trained=TRAINED)
    written = load_file(path)
    assert {key: tuple(tensor.shape) for key, tensor in written.items()} == SHAPES
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata.keys() == METADATA.keys()
    assert (metadata["format"], metadata["format_version"], metadata["base_model"]) == (
        "magicmirror-adapter",
        "1",
        "a/b",
    )
    assert json.loads(metadata["config"]) == CONFIG
    assert json.loads(metadata["trained"]) == {"stage": "image", "steps": 3, "data": "two portraits"}

    loaded, header = load_adapter(path, dtype=dtype)
    assert header == read_header(path)
    assert header.trained == TRAINED
    for key, tensor in adapter.state_dict().items():
        assert tensor.dtype == written[key].dtype == loaded.state_dict()[key].dtype == dtype
        assert torch.equal(tensor, written[key])
        assert torch.equal(tensor, loaded.state_dict()[key])


def test_half_precision_file_loads_as_float32(path: Path) -> None:
    """The type in the file is the writer's choice, the type in memory the reader's."""
    adapter, _ = load_adapter(write(path, hand_written(torch.float16)))
    assert {tensor.dtype for tensor in adapter.state_dict().values()} == {torch.float32}
    key = "face_proj.weight"
    assert_near(adapter.state_dict()[key], hand_written()[key], 1e-3)


def without(*keys: str) -> Callable[[Tensors], None]:
    def remove(tensors: Tensors) -> None:
        for key in keys:
            del tensors[key]

    return remove


def with_tensor(key: str, *shape: int) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({key: torch.zeros(shape)})


def several(*damages: Callable[[Tensors], None]) -> Callable[[Tensors], None]:
    return lambda tensors: [damage(tensors) for damage in damages]


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (without("face_proj.bias"), ["1 missing: face_proj.bias"]),
        (with_tensor("blocks.1.face_norm1.weight", 32), ["1 unexpected: blocks.1.face_norm1.weight"]),
        (with_tensor("id_proj.weight", 24, 9), ["1 of a wrong shape: id_proj.weight", "(24, 9)", "(9, 24)"]),
        (
            several(
                without("id_proj.bias", "face_proj.bias"), with_tensor("extra", 1), with_tensor("face_proj.weight", 1)
            ),
            ["2 missing", "id_proj.bias", "face_proj.bias", "1 unexpected: extra", "face_proj.weight (1,)"],
        ),
        (without(*(key for key in SHAPES if key.startswith("blocks.2"))), ["16 missing", "..."]),
    ],
    ids=["missing", "unexpected", "misshapen", "all at once", "many"],
)
def test_wrong_tensors(path: Path, damage: Callable[[Tensors], Any], named: list[str]) -> None:
    """One message lists everything that is wrong with the tensors."""
    tensors = hand_written()
    damage(tensors)
    with pytest.raises(CheckpointError) as error:
        load_adapter(write(path, tensors))
    assert path.name in str(error.value)
    assert [text for text in named if text not in str(error.value)] == []


@pytest.mark.parametrize(
    ("metadata", "named"),
    [
        ({"format": "pt"}, ["'pt'", "magicmirror-adapter"]),
        ({"format": None}, ["format=None"]),
        ({"format_version": "2"}, ["'2'", "'1'", "Update"]),
        ({"format_version": None}, ["None"]),
        ({"base_model": None, "trained": None}, ["base_model", "trained"]),
        ({"config": None}, ["config"]),
        ({"config": "{"}, ["`config`"]),
        ({"config": "[1, 2]"}, ["`config`"]),
        ({"config": json.dumps(CONFIG | {"depth": 4})}, ["unexpected ['depth']"]),
        ({"config": json.dumps({k: v for k, v in CONFIG.items() if k != "num_layers"})}, ["missing ['num_layers']"]),
        ({"config": json.dumps(CONFIG | {"id_proj_dim": -9})}, ["id_proj_dim=-9"]),
        ({"config": json.dumps(CONFIG | {"id_proj_dim": "9"})}, ["id_proj_dim='9'"]),
        ({"config": json.dumps(CONFIG | {"num_face_tokens": 3.0})}, ["num_face_tokens=3.0"]),
        ({"config": json.dumps(CONFIG | {"hidden_size": 33})}, ["hidden_size=33", "32"]),
        ({"config": json.dumps(CONFIG | {"adapted_layers": []})}, ["adapted_layers"]),
        ({"config": json.dumps(CONFIG | {"adapted_layers": [0, 5]})}, ["adapted_layers", "0..4"]),
        ({"config": json.dumps(CONFIG | {"adapted_layers": [2, 0]})}, ["adapted_layers", "ascending"]),
        ({"config": json.dumps(CONFIG | {"adapted_layers": 0})}, ["`config`"]),
        ({"config": json.dumps(CONFIG | {"perceiver_dim_head": 3})}, ["perceiver_dim=8", "3"]),
        ({"trained": json.dumps({"stage": "done", "steps": 1, "data": ""})}, ["'done'", "untrained, image, video"]),
        ({"trained": json.dumps({"stage": "video", "steps": "many", "data": ""})}, ["steps"]),
        ({"trained": json.dumps({"stage": "video"})}, ["missing ['data', 'steps']"]),
    ],
)
def test_wrong_metadata(path: Path, metadata: dict[str, str | None], named: list[str]) -> None:
    """Every kind of wrong header is refused, by the header alone and by the loader, naming what is wrong."""
    write(path, **metadata)
    for read in (read_header, load_adapter):
        with pytest.raises(CheckpointError) as error:
            read(path)
        assert path.name in str(error.value)
        assert [text for text in named if text not in str(error.value)] == []


def test_file_without_metadata(path: Path) -> None:
    """Tensors alone are not an adapter."""
    save_file(hand_written(), path)
    with pytest.raises(CheckpointError, match="not a Magic Mirror adapter"):
        load_adapter(path)


@pytest.mark.parametrize("size", [0, 1, 5, 200, -1], ids=["empty", "one byte", "length", "header", "body"])
def test_truncated_file(path: Path, size: int) -> None:
    """A download that was cut off, wherever, is told apart from a wrong file."""
    whole = write(path).read_bytes()
    path.write_bytes(whole[:size])
    with pytest.raises(CheckpointError, match="damaged or cut short"):
        load_adapter(path)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_pickle_is_never_read(path: Path, zipped: bool) -> None:
    """A `torch.save` file is refused for what it is, under any name."""
    torch.save(hand_written(), path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match="is a pickle"):
        load_adapter(path)


def test_header_length_that_looks_like_a_pickle(path: Path) -> None:
    """A safetensors file starts with the length of its header; 0x480 and 0x4B50 are the first bytes of pickles."""
    for length in (0x480, 0x4B50):
        write(path, {"no": torch.zeros(1)}, padding="")
        padding = length - int.from_bytes(path.read_bytes()[:8], "little")
        write(path, {"no": torch.zeros(1)}, padding="x" * padding)
        assert int.from_bytes(path.read_bytes()[:8], "little") == length
        assert read_header(path).config.to_dict() == CONFIG


def test_no_file(tmp_path: Path) -> None:
    """A missing path and a folder are told with their path."""
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(CheckpointError, match="There is no file") as error:
            load_adapter(path)
        assert str(path) in str(error.value)


def test_base_of_other_sizes(path: Path, tmp_path: Path) -> None:
    """An adapter meets its base before any weight is read; a misfit names each size that differs, and both values."""
    kind = TRANSFORMERS["5b"] | {"num_layers": 6, "text_embed_dim": 15}
    CogVideoXTransformer3DModel(**kind).save_config(tmp_path / "base" / "transformer")
    write(path, {"no": torch.zeros(1)})
    with pytest.raises(CheckpointError) as error:
        MagicMirror(FolderBase(tmp_path / "base"), adapter=path)
    for text in ("num_layers 5 instead of 6", "text_embed_dim 14 instead of 15", "someone/CogVideoX-tiny"):
        assert text in str(error.value)
    assert "hidden_size" not in str(error.value)


@contextmanager
def small_disk() -> Iterator[None]:
    """No file can grow beyond 4 KiB, as on a full disk. Around a call only: pytest's own output counts too."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("old", [b"an older file", None], ids=["over a file", "new"])
def test_failed_save_leaves_nothing(adapter: MagicMirrorAdapter, path: Path, old: bytes | None) -> None:
    """When the disk is full there is neither a partial file nor a change to the one that was there."""
    if old is not None:
        path.write_bytes(old)
    with pytest.raises(Exception, match="File too large"), small_disk():
        save_adapter(adapter, path, base_model="a/b", trained=TRAINED)
    assert [file.name for file in path.parent.iterdir()] == ([path.name] if old else [])
    assert old is None or path.read_bytes() == old


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers_are_refused(path: Path, value: float) -> None:
    weights = load_file(write(path))
    key = sorted(weights)[3]
    weights[key].view(-1)[-1] = value
    save_file(weights, path, metadata=read_metadata(path))
    with pytest.raises(CheckpointError, match=rf"no numbers in float32, in {re.escape(key)}"):
        load_adapter(path)


def test_weights_too_large_for_the_precision_are_refused_and_sums_of_many_are_not(path: Path) -> None:
    weights, metadata = load_file(write(path)), read_metadata(path)
    key = max(weights, key=lambda name: weights[name].numel())
    save_file(weights | {key: torch.full_like(weights[key], 3e38)}, path, metadata=metadata)
    load_adapter(path)  # their sum overflows, they do not
    with pytest.raises(CheckpointError, match=r"no numbers in float16.*choose the precision bf16"):
        load_adapter(path, dtype=torch.float16)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_value_that_is_no_number_is_found(dtype: torch.dtype, tmp_path: Path) -> None:
    largest = torch.finfo(dtype).max
    check_weight(torch.tensor([largest, largest, -largest, 0.0], dtype=dtype), "key", tmp_path)
    for value in (float("nan"), float("inf"), float("-inf")):
        with pytest.raises(CheckpointError, match="no numbers"):
            check_weight(torch.tensor([0.0, value, 1.0], dtype=dtype), "key", tmp_path)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_every_byte_that_is_no_number_is_found(dtype: torch.dtype, tmp_path: Path) -> None:
    for value in torch.arange(256, dtype=torch.uint8).view(dtype):
        with nullcontext() if value.float().isfinite() else pytest.raises(CheckpointError, match="no numbers"):
            check_weight(value[None], "key", tmp_path)
    check_weight(torch.empty(0, dtype=dtype), "key", tmp_path)
    with pytest.raises(CheckpointError, match="float8_e4m3fnuz, not a floating-point"):
        check_weight(torch.zeros(1).to(torch.float8_e4m3fnuz), "key", tmp_path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.int64])
def test_weights_of_another_kind_are_refused(path: Path, dtype: torch.dtype) -> None:
    weights, metadata = load_file(write(path)), read_metadata(path)
    key = sorted(weights)[0]
    save_file(weights | {key: weights[key].to(dtype)}, path, metadata=metadata)
    with pytest.raises(CheckpointError, match=f"{key} is {str(dtype).removeprefix('torch.')}, not a floating-point"):
        load_adapter(path)


@pytest.mark.parametrize(
    "sizes",
    [{"num_layers": 10**6, "adapted_layers": list(range(10**5))}, {"can_hidden_dim": 2**62}, {"hidden_size": 10**9}],
)
def test_a_header_cannot_ask_for_more_than_fits(path: Path, sizes: dict[str, object]) -> None:
    write(path, config=json.dumps(CONFIG | sizes))
    begun = time.process_time()
    with pytest.raises(CheckpointError, match=r"at most 128|from 1 to 16384"):
        read_header(path)
    assert time.process_time() - begun < 2


def test_a_loaded_adapter_does_not_change_with_its_file(path: Path) -> None:
    """Nor does it kill the process, as a mapped file that is cut would."""
    adapter, _ = load_adapter(write(path))
    before = {key: tensor.clone() for key, tensor in adapter.state_dict().items()}
    with path.open("r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
        file.truncate(100)
    assert all(torch.equal(tensor, before[key]) for key, tensor in adapter.state_dict().items())


def read_metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()
