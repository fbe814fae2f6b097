"""A captioner and a classifier from local folders, as tiny models of the real classes."""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from lab.corpus.letters import Letters, lettered
from lab.corpus.photographs import album
from mm_core.curation.clips import clip_frames, measure_video
from mm_core.curation.config import Keeping, Measuring
from mm_core.curation.items import Item
from mm_core.curation.measure import Measurer
from mm_core.curation.rules import judged, rules
from mm_core.curation.text import TextReader
from mm_core.errors import CheckpointError, MagicMirrorError
from mm_core.video import write_video

TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}a {% endif %}{% endfor %}{% endfor %}"
)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classifier")
    sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=16)
    model = ViTForImageClassification(ViTConfig(**sizes, patch_size=8, id2label={0: "fine", 1: "nsfw"}))
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([0.0, 3.0]))
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def captioner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Knows five words, and ends its text after so many."""
    folder = tmp_path_factory.mktemp("captioner")
    words = {word: number for number, word in enumerate(("<pad>", "</s>", "<image>", "a", "man", "reads", "<unk>"))}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    special = dict(pad_token="<pad>", eos_token="</s>", unk_token="<unk>", additional_special_tokens=["<image>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    sizes = dict(hidden_size=8, num_hidden_layers=2, num_attention_heads=1, intermediate_size=8)
    vision = CLIPVisionConfig(**sizes, image_size=16, patch_size=8)
    text = LlamaConfig(**sizes, num_key_value_heads=1, vocab_size=len(words), pad_token_id=0, eos_token_id=1)
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=2, image_seq_length=4)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    LlavaProcessor(
        images,
        fast,
        patch_size=8,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    return folder


def test_they_say_what_is_seen_and_what_is_refused(
    tmp_path: Path, insightface_root: Path, captioner: Path, classifier: Path
) -> None:
    Image.fromarray(np.full((40, 30, 3), 99, np.uint8)).save(tmp_path / "1.png")
    settings = Measuring(
        insightface_root=str(insightface_root), face_pack="buffalo_sc", captioner=str(captioner), safety=str(classifier)
    )
    measurer = Measurer(settings)
    item = Item(name="1", suffix=".png", content=tmp_path / "1.png")
    row = measurer.picture(item)
    assert row["labels"] == {"nsfw": 0.9526, "fine": 0.0474}
    assert row["caption"] and set(row["caption"].split()) <= {"a", "man", "reads", "<unk>", "<image>", "<pad>"}
    assert measurer.picture(item)["caption"] == row["caption"]
    item.info = {"caption": "A man."}
    given = measurer.picture(item)
    assert given["caption"] == "A man." and {"caption", "safety", "faces"} <= measurer.seconds.keys()
    fine = given | {"size": [800, 800], "looks": [[{"score": 0.9, "size": 200, "yaw": 0, "roll": 0, "sharpness": 99}]]}
    asked = rules("pictures", settings)
    assert judged(fine, asked, Keeping()) is None
    assert judged(fine, asked, Keeping(refused_labels=("nsfw",)))[0] == "safety"


def test_a_folder_without_a_model_is_told(tmp_path: Path, insightface_root: Path) -> None:
    settings = Measuring(insightface_root=str(insightface_root), face_pack="buffalo_sc", safety=str(tmp_path))
    with pytest.raises(CheckpointError, match="holds no model"):
        Measurer(settings).by_models(np.zeros((8, 8, 3), np.uint8), "A man.")


def test_footage_with_too_few_frames_says_so(tmp_path: Path, insightface_root: Path) -> None:
    """Where a frame stands for several times, the clips after it are still their own."""
    path = tmp_path / "slow.mp4"
    write_video(path, np.repeat(np.arange(20, dtype=np.uint8) * 10, 64 * 64 * 3).reshape(20, 64, 64, 3), 4)
    measurer = Measurer(Measuring(insightface_root=str(insightface_root), face_pack="buffalo_sc", frames=9))
    rows = list(measure_video(measurer, Item(name="slow", suffix=".mp4", content=path)))
    assert [row["frames"][0] for row in rows] == [0, 4, 9, 13] and {row["rate"] for row in rows} == {4.0}
    assert {judged(row, rules("video", measurer.settings), Keeping())[0] for row in rows} == {"rate"}
    assert abs(clip_frames(path, [3, 3, 7]).mean((1, 2, 3)) - [30, 30, 70]).max() < 3
    with pytest.raises(MagicMirrorError, match="ends before frame 20"):
        clip_frames(path, [3, 20])


def test_text_is_read_in_pictures_of_any_shape_and_nothing_is_fetched(
    photographs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("it asked for a connection"))
    reader = TextReader()
    for shape in ((1, 1), (3, 5000), (9000, 40), (300, 300)):
        assert reader.share(np.full((*shape, 3), 90, np.uint8)) == 0
    grey = np.full((900, 1200, 3), 90, np.uint8)
    sale = Letters(text="SALE", size=1 / 5, at=(0.5, 0.5))
    assert 3 < reader.share(lettered(grey, sale)) < 20
    assert reader.share(lettered(grey, replace(sale, text="0000"))) == 0  # what glasses and rings are read as
    sample = replace(sale, text="SAMPLE", at=(0.5, 0.6), strength=0.35)
    over_gravel, _ = album(photographs).photo(817, 768)  # read in a part of it alone
    assert reader.share(lettered(over_gravel, sample)) > 3 and reader.share(over_gravel) == 0
