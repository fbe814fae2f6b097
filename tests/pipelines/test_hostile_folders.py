"""A base model's folder from a stranger: nothing in it runs, asks or reaches out; what is wrong is said in words."""

from __future__ import annotations

import builtins
import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mm_core.doctor import PROBLEM, find_models
from mm_core.errors import CheckpointError
from mm_core.folders import Folders
from mm_core.pipelines import tiny
from mm_core.pipelines.base import FolderBase, TinyBase
from mm_core.pipelines.tokenizer import load_tokenizer

INDEX, SCHEDULER = "model_index.json", "scheduler/scheduler_config.json"
_ROTARY = "use_rotary_positional_embeddings"
DEEP = "[" * 100_000 + "]" * 100_000


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No host is looked up or reached, and nobody is asked."""

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError(f"a request was made: {arguments}")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(builtins, "input", refuse)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return shutil.copytree(tiny.WEIGHTS, tmp_path / "CogVideo" / "mine")


@pytest.fixture
def witness(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that exists once `evil.py` has run; the module lies in the folder, in its parts, and on Python's path."""
    mark = tmp_path / "it ran"
    for place in (folder, *(part for part in folder.iterdir() if part.is_dir())):
        (place / "evil.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass Evil: pass\nclass EvilVae: pass\n")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.chdir(folder)
    return mark


def change(folder: Path, file: str, **values: Any) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def load(folder: Path) -> None:
    """All that the product does with a folder."""
    base = FolderBase(folder)
    _sizes = base.limits, base.tokenizer("a man reads")
    base.load_text_encoder(torch.float32)
    base.load(torch.float32)


def test_the_model_that_ships_needs_no_network(folder: Path) -> None:
    load(folder)
    assert len(TinyBase().tokenizer("a man img").input_ids) == 4


@pytest.mark.parametrize(
    "values",
    [
        {"_class_name": ["evil", "Evil"]},
        {"_class_name": "Evil"},
        {"vae": ["evil", "EvilVae"]},
        {"vae": ["diffusers", "AutoencoderKL"]},
        {"tokenizer": ["evil", "Evil"]},
        {"extra": ["evil", "Evil"]},
        {"scheduler": ["os", "system"]},
        {"transformer": "evil"},
        {"text_encoder": None},
    ],
    ids=str,
)
def test_no_class_of_the_folder_is_imported(folder: Path, witness: Path, values: dict[str, Any]) -> None:
    change(folder, INDEX, **values)
    with pytest.raises(CheckpointError, match=r"model_index\.json names .* Nothing of it was loaded"):
        FolderBase(folder).load(torch.float32)
    assert not witness.exists()
    (finding,) = [found for found in find_models(Folders(base_models=(folder.parent,))) if found.name == "mine"]
    assert finding.state == PROBLEM and "model_index.json names" in finding.problem


@pytest.mark.parametrize(
    "part", ["tokenizer/tokenizer_config.json", "tokenizer/config.json", "text_encoder/config.json"]
)
def test_no_auto_map_is_followed_or_asked_about(folder: Path, witness: Path, part: str) -> None:
    if not (folder / part).is_file():
        (folder / part).write_text('{"model_type": "t5"}')
    names = {name: "evil.Evil" for name in ("AutoConfig", "AutoModel", "T5EncoderModel")}
    change(folder, part, auto_map=names | {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, tokenizer_class="Evil")
    load(folder)
    assert not witness.exists()


@pytest.mark.parametrize("content", ['"THUDM/CogVideoX-5b"', "[]", "3", "null", "{", DEEP, '{"beta_start": NaN}'])
def test_a_scheduler_config_that_is_none_is_refused_without_a_request(folder: Path, content: str) -> None:
    (folder / SCHEDULER).write_text(content)
    with pytest.raises(CheckpointError, match=r"scheduler_config\.json"):
        FolderBase(folder).load(torch.float32)


@pytest.mark.parametrize("shard", ["../../secret.safetensors", "/etc/passwd", "evil.bin", "a\\b.safetensors", 3, ""])
def test_weights_are_only_taken_from_the_folder_itself(folder: Path, shard: Any) -> None:
    index = folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": shard}}))
    with pytest.raises(CheckpointError, match=r"index\.json is damaged: its weight_map must name"):
        FolderBase(folder).check_complete()


@pytest.mark.parametrize(
    ("file", "values", "says"),
    [
        ("transformer/config.json", {"num_layers": 10**6}, "num_layers is 1000000; it must be a whole number from 1"),
        ("transformer/config.json", {"num_layers": "8"}, "num_layers is '8'"),
        ("transformer/config.json", {"num_layers": True}, "num_layers is True"),
        ("transformer/config.json", {"attention_head_dim": 24, "num_attention_heads": 8}, "a multiple of 16"),
        ("transformer/config.json", {"norm_eps": [[[]]]}, "norm_eps is a list of 1"),
        ("transformer/config.json", {"quantization_config": {"quant_method": "torchao"}}, "quantised weights"),
        ("transformer/config.json", {"text_embed_dim": 64}, "text_embed_dim is 64, the text encoder's d_model is 128"),
        ("transformer/config.json", {"num_layers": 9}, "missing: transformer_blocks.8"),
        (
            "transformer/config.json",
            {f"sample_{side}": 1024 for side in ("width", "height", "frames")} | {_ROTARY: False},
            "a table of positions",
        ),
        ("vae/config.json", {"block_out_channels": [10**9] * 3}, "block_out_channels is a list of 3"),
        ("vae/config.json", {"block_out_channels": [16, 32]}, "missing|do not fit"),
        ("vae/config.json", {"norm_num_groups": 7}, "do not fit each other"),
        ("vae/config.json", {"down_block_types": ["evil.Evil"] * 3}, "down_block_types is a list"),
        ("vae/config.json", {"scaling_factor": 0}, "scaling_factor is 0"),
        ("text_encoder/config.json", {"d_ff": 2**40}, f"d_ff is {2**40}"),
        ("text_encoder/config.json", {"vocab_size": 1_000_000, "d_ff": 65_536}, "of a wrong shape: shared.weight"),
        ("text_encoder/config.json", {"vocab_size": 100}, "435 tokens, its text encoder 100"),
        (SCHEDULER, {"_class_name": "EvilScheduler"}, "The scheduler is 'EvilScheduler'"),
        (SCHEDULER, {"num_train_timesteps": 2**62}, "num_train_timesteps"),
        (SCHEDULER, {"trained_betas": [[1]]}, "trained_betas"),
    ],
)  # fmt: skip
def test_settings_are_held_against_limits_and_the_files(
    folder: Path, file: str, values: dict[str, Any], says: str
) -> None:
    change(folder, file, **values)
    with pytest.raises(CheckpointError, match=says):
        load(folder)


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
@pytest.mark.parametrize("damage", ["missing", "unexpected", "integers"])
def test_weights_are_loaded_strictly(folder: Path, part: str, damage: str) -> None:
    """A text encoder that lacked a tensor once got random values, and made a clip of them."""
    (path,) = (folder / part).glob("*.safetensors")
    weights = load_file(path)
    key = sorted(weights)[-1]
    if damage == "missing":
        del weights[key]
    elif damage == "unexpected":
        weights[f"{key}.lora"] = torch.zeros(1)
    else:
        weights[key] = weights[key].to(torch.int8)
    save_file(weights, path)
    with pytest.raises(CheckpointError, match=rf"{damage}: {key}|{key} is int8"):
        FolderBase(folder).load(torch.float32)


@pytest.mark.parametrize("file", ["transformer/config.json", "vae/config.json", "text_encoder/config.json", INDEX])
def test_nesting_without_end_stops_neither_loading_nor_the_doctor(folder: Path, file: str) -> None:
    (folder / file).write_text('{"x": ' + DEEP + "}")
    with pytest.raises(CheckpointError, match="nested too deeply"):
        FolderBase(folder).load(torch.float32)
    (finding,) = [found for found in find_models(Folders(base_models=(folder.parent,))) if found.name == "mine"]
    assert finding.state == PROBLEM and "nested too deeply" in finding.problem


def test_settings_of_great_length_are_not_read(folder: Path) -> None:
    (folder / INDEX).write_text('{"x": "' + "x" * 2**21 + '"}')
    with pytest.raises(CheckpointError, match=r"has 2,097,161 bytes; a file of this kind has at most 1,048,576"):
        FolderBase(folder).load(torch.float32)


def _model(content: dict[str, Any]) -> None:
    content["model"] = {"type": "BPE", "vocab": {"a": 0}, "merges": []}


def _split(content: dict[str, Any]) -> None:
    step = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [content["pre_tokenizer"], step]}


def _replace(content: dict[str, Any]) -> None:
    content["normalizer"] = {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "b"}


def _no_unknown(content: dict[str, Any]) -> None:
    content["model"]["unk_id"] = 10**9


def _not_special(content: dict[str, Any]) -> None:
    content["added_tokens"] = []
    content["model"]["vocab"] = [["a", -1.0], ["<unk>", 0.0], ["b", 0.0]]


@pytest.mark.parametrize("damage", [_model, _split, _replace, _no_unknown, _not_special])
def test_a_tokenizer_that_is_not_t5s_is_refused(folder: Path, damage: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "tokenizer" / "tokenizer.json"
    content = json.loads(path.read_text())
    damage(content)
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        load_tokenizer(path.parent)


def test_a_sentencepiece_model_is_read_alone(tmp_path: Path) -> None:
    """The published folders hold no tokenizer.json; the ids are those that transformers reads of the whole folder."""
    from sentencepiece import SentencePieceTrainer
    from transformers import AutoTokenizer

    (tmp_path / "words.txt").write_text("\n".join(f"a man reads page {n} of a book by the sea" for n in range(300)))
    SentencePieceTrainer.train(
        input=str(tmp_path / "words.txt"), model_prefix=str(tmp_path / "spiece"), vocab_size=45, model_type="unigram",
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, pad_piece="<pad>", minloglevel=2,
    )  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer", "extra_ids": 100}')
    theirs = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    ours = load_tokenizer(tmp_path)
    for text in ("a man  reads", "the sea, 300 pages", "Zebra"):
        assert ours(text, add_special_tokens=False).input_ids == theirs(text, add_special_tokens=False).input_ids
    assert (ours.pad_token_id, ours.eos_token_id, ours.unk_token_id) == (0, 1, 2) and ours.is_fast
    (tmp_path / "spiece.model").write_bytes(b"\x0a\x0e" + bytes(range(200)))
    with pytest.raises(CheckpointError, match=r"spiece\.model is damaged"):
        load_tokenizer(tmp_path)
