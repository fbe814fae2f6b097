"""The small model that comes with the pack: its files, and that a person is recognisable in its clips."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mm_core.checkpoints.photomaker import read_id_encoder_config
from mm_core.evaluation.recognisers import find_face
from mm_core.faces.analysis import FaceAnalyzer
from mm_core.faces.references import analyse_references
from mm_core.pipelines import tiny
from mm_core.pipelines.base import TinyBase
from mm_core.pipelines.conditioning import AdapterSettings
from mm_core.pipelines.magic_mirror import ClipSettings, MagicMirror

LIMIT = 40 * 10**6  # bytes
PROMPT = "A person img looks towards the camera and smiles."


def test_its_files_are_whole_small_and_from_nowhere() -> None:
    base = TinyBase()
    base.check_complete()
    files = [path for path in base.folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < LIMIT
    for path in base.folder.rglob("*.json"):
        text = path.read_text(encoding="utf-8")
        assert "/root" not in text and "name_or_path" not in text, path


def test_its_sizes_are_those_that_are_trained() -> None:
    base, mirror = TinyBase(), MagicMirror(TinyBase(), device=torch.device("cpu"))
    assert {name: base.transformer_config[name] for name in tiny.TRANSFORMER} == tiny.TRANSFORMER
    assert mirror.header.config == tiny.ADAPTER and mirror.header.base_model == base.name == tiny.NAME
    assert mirror.header.trained.stage == "video"
    assert read_id_encoder_config(base.id_encoder) == tiny.ID_ENCODER
    assert (
        base.tokenizer("A bearded man img turns left.").input_ids
        == tiny.build_tokenizer()("A bearded man img turns left.").input_ids
    )
    config = json.loads((base.folder / "vae" / "config.json").read_text(encoding="utf-8"))
    assert config["scaling_factor"] != 1.0  # measured on its latents


@pytest.fixture(scope="module")
def clips(insightface_root: Path) -> tuple[FaceAnalyzer, list[np.ndarray], list[np.ndarray]]:
    """Of three people no training has seen: a photo, and a clip (F, H, W, 3), all with one prompt and one seed."""
    people = pytest.importorskip("mm_core.data.people.render", reason="needs the extra `people`", exc_type=ImportError)
    from mm_core.data.people.person import Person
    from mm_core.data.people.scene import sample_clip
    from mm_core.data.people.traits import HELD_OUT

    analyzer = FaceAnalyzer(insightface_root, "buffalo_sc", device="cpu")
    mirror = MagicMirror(TinyBase(), device=torch.device("cpu"))
    photos, frames = [], []
    for seed in range(HELD_OUT, HELD_OUT + 3):
        photo = people.render_clip(Person.from_seed(seed), sample_clip(seed, 0))[4]
        settings = ClipSettings(
            prompt=PROMPT, width=64, height=64, num_frames=9, steps=15, guidance_scale=4.0, dynamic_guidance=False,
            scheduler="ddim",
        )  # fmt: skip
        identity = mirror.identity(analyse_references(analyzer, [photo]))
        clip = mirror.generate(settings, identity, AdapterSettings()).frames
        photos.append(photo)
        frames.append((clip.numpy() * 255).round().astype(np.uint8))
    return analyzer, photos, frames


def test_a_person_is_recognisable(clips: tuple[FaceAnalyzer, list[np.ndarray], list[np.ndarray]]) -> None:
    """A face in every clip, and each clip is most like its own person's photo; same noise, same words."""
    analyzer, photos, frames = clips
    known = [_embedding(analyzer, photo) for photo in photos]
    seen = [np.mean([_embedding(analyzer, frame) for frame in clip[::4]], axis=0) for clip in frames]
    centre = np.mean([*known, *seen], axis=0)
    cosines = [[_cosine(a - centre, b - centre) for b in known] for a in seen]
    assert np.argmax(cosines, axis=1).tolist() == [0, 1, 2], cosines


def test_the_clips_move(clips: tuple[FaceAnalyzer, list[np.ndarray], list[np.ndarray]]) -> None:
    """Not a still: frames differ from the first one by more than coding noise would."""
    for clip in clips[2]:
        assert np.abs(clip[-1].astype(float) - clip[0]).mean() > 2


def _embedding(analyzer: FaceAnalyzer, picture: np.ndarray) -> np.ndarray:
    seen = find_face(analyzer, picture)
    assert seen is not None, "there is no face"
    embedding = seen[1].embedding
    return embedding / np.linalg.norm(embedding)


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
