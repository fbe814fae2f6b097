"""What was encoded once is on disk for the next process; nothing else changes, and nothing of it can do harm."""

from __future__ import annotations

import gc
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_models import noise

from mm_core.models.id_encoder import IDEncoder
from mm_core.pipelines import disk_cache
from mm_core.pipelines.base import FolderBase, TinyBase
from mm_core.pipelines.disk_cache import DiskCache
from mm_core.pipelines.identity import Identity
from mm_core.pipelines.magic_mirror import MagicMirror

CPU = torch.device("cpu")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Each T5 that is read, and each run of an ID encoder."""
    seen, load, forward = [], FolderBase.load_text_encoder, IDEncoder.forward
    monkeypatch.setattr(FolderBase, "load_text_encoder", lambda *args: seen.append("T5") or load(*args))
    monkeypatch.setattr(IDEncoder, "forward", lambda *args: seen.append("photos") or forward(*args))
    return seen


def fresh(cache: Path, base: FolderBase | None = None, **options: str) -> MagicMirror:
    """As in a process that has just started."""
    gc.collect()
    return MagicMirror(base or TinyBase(), device=CPU, cache=cache, **options)


def encode(mirror: MagicMirror, prompt: str = "a man reads") -> torch.Tensor:
    return mirror.encode_text(prompt)


def test_a_prompt_seen_before_needs_no_encoder(tmp_path: Path, reads: list[str], folders: dict[str, Path]) -> None:
    """Another prompt, type or T5 does, and so does a file that is damaged."""
    cache, folder = tmp_path / "cache", Path(shutil.copytree(folders["5b"], tmp_path / "5b"))
    first = encode(fresh(cache, FolderBase(folder)))
    assert torch.equal(encode(fresh(cache, FolderBase(folder))), first) and reads == ["T5"]
    assert cache.stat().st_mode & 0o077 == 0
    (file,) = cache.iterdir()
    content = file.read_bytes()
    for damaged in (content[:-1], content[:-1] + bytes([content[-1] ^ 1]), b""):
        file.write_bytes(damaged)
        assert torch.equal(encode(fresh(cache, FolderBase(folder))), first)
        assert file.read_bytes() == content
    assert len(reads) == 4
    encode(fresh(cache, FolderBase(folder)), "a man sleeps")
    encode(fresh(cache, FolderBase(folder), precision="bf16"))
    os.utime(FolderBase(folder).text_encoder_files[0])
    encode(fresh(cache, FolderBase(folder)))
    assert len(reads) == 7


def test_photos_seen_before_need_no_encoder(tmp_path: Path, reads: list[str]) -> None:
    """Another crop or embedding does: no person is taken for another."""

    def identity(person: int, crop: int = 0) -> Identity:
        photo = SimpleNamespace(
            crop=np.full((224, 224, 3), crop, np.uint8), face=SimpleNamespace(embedding=noise(512, seed=person).numpy())
        )
        return fresh(tmp_path).identity([photo])

    first, again, *others = identity(0), identity(0), identity(1), identity(0, crop=1)
    assert all(map(torch.equal, first.features, again.features)) and again.encoder == first.encoder
    assert reads == ["photos"] * 3
    for other in others:
        assert not torch.equal(other.features.id_tokens, first.features.id_tokens)


def test_what_was_used_longest_ago_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = DiskCache(tmp_path)
    monkeypatch.setattr(disk_cache, "_MOST_BYTES", 3000)
    for age, key in enumerate("abc"):
        cache.put(key, {"x": torch.zeros(200)})
        os.utime(tmp_path / f"{key}.safetensors", (age, age))
        assert age or cache.get("a")
    os.utime(tmp_path / "a.safetensors", (9, 9))
    cache.put("d", {"x": torch.zeros(200)})
    assert [bool(cache.get(key)) for key in "abcd"] == [True, False, True, True]


def test_a_folder_that_cannot_be_written_is_none(tmp_path: Path, reads: list[str]) -> None:
    (tmp_path / "file").write_text("")
    encode(fresh(tmp_path / "file" / "cache"))
    assert reads == ["T5"]
