"""Text alignment: a real CLIPModel at a tiny size, with random weights."""

from __future__ import annotations

import json
import string
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from mm_core.errors import CheckpointError, MagicMirrorError
from mm_core.evaluation.text import TextAlignment, find_prompts, sampled

WORDS = [*string.ascii_lowercase, *(letter + "</w>" for letter in string.ascii_lowercase)]
VOCABULARY = {token: index for index, token in enumerate([*WORDS, "<|startoftext|>", "<|endoftext|>"])}
START, END = len(WORDS), len(WORDS) + 1


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = sizes | {"vocab_size": len(VOCABULARY), "max_position_embeddings": 12, "eos_token_id": END}
    vision = sizes | {"image_size": 16, "patch_size": 8}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(VOCABULARY), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}), encoding="utf-8")
    return folder


def test_the_mean_cosine_of_frames_and_prompt(clip_folder: Path) -> None:
    alignment = TextAlignment(clip_folder)
    frames = np.random.default_rng(0).integers(0, 256, (3, 24, 32, 3), dtype=np.uint8)
    each = [alignment([frame], "a man") for frame in frames]
    assert all(-1 <= value <= 1 for value in each) and len(set(each)) == 3
    assert alignment(frames, "a man") == pytest.approx(np.mean(each), abs=1e-6)
    assert alignment(frames, "a woman") != pytest.approx(alignment(frames, "a man"), abs=1e-6)
    assert alignment(frames, "a man " * 50) == pytest.approx(alignment(frames, "a man " * 40), abs=1e-6)  # cut off
    assert np.isnan(alignment([], "a man"))


def test_no_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no CLIP model"):
        TextAlignment(tmp_path / "nowhere")


def test_frames_are_spread_over_the_clip() -> None:
    frames = [np.array(index) for index in range(49)]
    assert [int(frame) for frame in sampled(frames, 49)] == [0, 7, 14, 21, 27, 34, 41, 48]


def test_prompts_beside_the_videos_come_first(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text("beside\n", encoding="utf-8")
    listed = {"a.mp4": "listed a", "sub/b.mp4": "listed b", "c": "listed c"}
    (tmp_path / "prompts.json").write_text(json.dumps(listed), encoding="utf-8")
    a, b, c, d = videos = [tmp_path / name for name in ("a.mp4", "sub/b.mp4", "c.webm", "d.mp4")]
    assert find_prompts(tmp_path, videos) == {a: "beside", b: "listed b", c: "listed c"}
    (tmp_path / "of" / "id_1").mkdir(parents=True)
    (tmp_path / "of" / "id_1" / "prompt2.txt").write_text("IPVG's\n", encoding="utf-8")
    theirs = tmp_path / "id_1_prompt2.mp4"
    assert find_prompts(tmp_path, [theirs, d], tmp_path / "of") == {theirs: "IPVG's"}
    (tmp_path / "prompts.json").write_text('["a"]', encoding="utf-8")
    with pytest.raises(MagicMirrorError, match="one object of prompts"):
        find_prompts(tmp_path, [d])
