"""The ID encoder against PhotoMaker-V2's published file.

`photomaker_v2_keys.json` lists the keys and shapes of the file's `id_encoder` part, written down from the published
architecture: CLIP ViT-L/14 with two projections, the Q-Former perceiver, and a text fusion that is not used here.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from untrained_tiny import build_id_encoder

from mm_core.checkpoints.photomaker import convert_id_encoder, id_encoder_tensors, load_id_encoder, read_fingerprint
from mm_core.errors import CheckpointError
from mm_core.pipelines.tiny import ID_ENCODER

PUBLISHED = json.loads(Path(__file__).with_name("photomaker_v2_keys.json").read_text(encoding="utf-8"))

Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def weights() -> Weights:
    """The tiny encoder's weights under the published names."""
    return {key: tensor.clone() for key, tensor in build_id_encoder(torch.float32).state_dict().items()}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "photomaker-v2.bin"


def save(weights: Weights, path: Path) -> Path:
    """A file laid out as the published one, whose LoRA part is not ours."""
    torch.save({"id_encoder": weights, "lora_weights": {"unet.down.lora_A": torch.zeros(2, 2)}}, path)
    return path


def test_published_keys() -> None:
    """At full size the encoder has exactly the keys and shapes of the published file."""
    assert {key: list(shape) for key, shape in id_encoder_tensors().items()} == PUBLISHED


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strict_load(weights: Weights, path: Path, dtype: torch.dtype) -> None:
    """Every tensor of the file lands in the encoder, in the type asked for, and the encoder runs."""
    encoder = load_id_encoder(save(weights, path), dtype=dtype, config=ID_ENCODER)
    loaded = encoder.state_dict()
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[key], tensor.to(dtype)) for key, tensor in weights.items())
    pixels, embeddings = torch.rand(2, 3, 224, 224), torch.randn(2, 512)
    ours = encoder(pixels, embeddings)
    expected = build_id_encoder(dtype)(pixels, embeddings)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected))


@pytest.mark.parametrize("prefix", ["id_encoder.", ""])
def test_safetensors_copy(weights: Weights, tmp_path: Path, prefix: str) -> None:
    """A converted copy loads, with or without the name of the part before its keys."""
    path = tmp_path / "photomaker-v2.safetensors"
    save_file({prefix + key: tensor for key, tensor in weights.items()}, path)
    loaded = load_id_encoder(path, config=ID_ENCODER).state_dict()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in weights.items())


def test_conversion(path: Path) -> None:
    """Every tensor of a file with the published keys, its LoRA part too, stands in the copy to the last bit."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        key: torch.randn([min(n, 3) for n in shape], generator=generator).half() for key, shape in PUBLISHED.items()
    }
    keys = iter(PUBLISHED)
    weights[next(keys)].flatten()[0] = float("nan")
    shared = next(keys)
    weights[shared] = weights[next(keys)]  # one memory, two names
    before = save(weights, path).read_bytes()
    copy = convert_id_encoder(path)
    assert copy == path.with_suffix(".safetensors") and path.read_bytes() == before
    assert sorted(file.name for file in path.parent.iterdir()) == [path.name, copy.name]
    found = load_file(copy)
    assert found.pop("lora_weights.unet.down.lora_A").shape == (2, 2)
    assert found.keys() == {f"id_encoder.{key}" for key in PUBLISHED}
    for key, tensor in weights.items():
        ours = found[f"id_encoder.{key}"]
        assert ours.dtype == tensor.dtype and ours.shape == tensor.shape
        assert ours.numpy().tobytes() == tensor.numpy().tobytes()


def test_a_converted_encoder_is_the_same_one(weights: Weights, path: Path) -> None:
    """It loads as the .bin does, and identities that were saved with that one stay valid."""
    positions = {"vision_model.embeddings.position_ids": torch.arange(50)[None]}
    copy = convert_id_encoder(save(weights | positions, path))
    assert read_fingerprint(copy) == read_fingerprint(path)
    ours, theirs = (load_id_encoder(file, config=ID_ENCODER).state_dict() for file in (copy, path))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_copy_that_differs_is_not_kept(weights: Weights, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that writes one bit wrong."""

    def write_badly(tensors: Weights, file: Path) -> None:
        save_file(tensors, file)
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)

    monkeypatch.setattr("mm_core.checkpoints.photomaker.save_file", write_badly)
    save(weights, path)
    with pytest.raises(CheckpointError, match=r"The copy that was written differs in .*Check the disk"):
        convert_id_encoder(path)
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("content", [{"id_encoder": {"x": torch.zeros(1)}, "epoch": 3}, {"id_encoder": {"x": 1}}])
def test_only_tensors_are_converted(path: Path, content: object) -> None:
    torch.save(content, path)
    with pytest.raises(CheckpointError, match="no set of tensors"):
        convert_id_encoder(path)
    assert list(path.parent.iterdir()) == [path]


def test_old_buffer_is_tolerated(weights: Weights, path: Path) -> None:
    """Files written by older transformers hold the position numbers as a tensor."""
    positions = torch.arange(50)[None]
    old = weights | {"vision_model.embeddings.position_ids": positions}
    encoder = load_id_encoder(save(old, path), config=ID_ENCODER)
    assert torch.equal(encoder.vision_model.embeddings.position_ids, positions)


def test_wrong_tensors(weights: Weights, path: Path) -> None:
    """One message lists what is missing, unexpected and misshapen."""
    wrong = weights | {"extra.weight": torch.zeros(1), "visual_projection.weight": torch.zeros(3, 4)}
    del wrong["qformer_perceiver.token_norm.bias"]
    with pytest.raises(CheckpointError) as error:
        load_id_encoder(save(wrong, path), config=ID_ENCODER)
    for text in (
        "1 missing: qformer_perceiver.token_norm.bias",
        "1 unexpected: extra.weight",
        "visual_projection.weight (3, 4) instead of (64, 192)",
    ):
        assert text in str(error.value)


class Malicious:
    """Unpickling it would create a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_malicious_pickle_runs_nothing(weights: Weights, path: Path, tmp_path: Path, zipped: bool) -> None:
    """Code in the file is refused, not run."""
    target = tmp_path / "owned"
    torch.save({"id_encoder": weights, "code": Malicious(target)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=path.name):
        load_id_encoder(path, config=ID_ENCODER)
    assert not target.exists()


@pytest.mark.parametrize("size", [0, 1, 1000, -1], ids=["empty", "one byte", "start", "end"])
def test_truncated_file(weights: Weights, path: Path, size: int) -> None:
    """A file that was cut off, wherever, is an error of ours."""
    path.write_bytes(save(weights, path).read_bytes()[:size])
    with pytest.raises(CheckpointError, match=path.name):
        load_id_encoder(path, config=ID_ENCODER)


@pytest.mark.parametrize("content", [[1, 2], {"state": {}}, {"id_encoder": [1]}])
def test_another_file(path: Path, content: object) -> None:
    """Something else that torch saved is told apart."""
    torch.save(content, path)
    with pytest.raises(CheckpointError, match="id_encoder"):
        load_id_encoder(path, config=ID_ENCODER)


def test_no_file(path: Path) -> None:
    """The message says which file to get."""
    with pytest.raises(CheckpointError, match="TencentARC/PhotoMaker-V2"):
        load_id_encoder(path)
