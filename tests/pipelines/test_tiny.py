"""The small model that comes with the pack: its files, and what a photo does to its clips."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mm_core.checkpoints.photomaker import read_id_encoder_config
from mm_core.faces.analysis import FaceAnalyzer
from mm_core.faces.references import analyse_references
from mm_core.pipelines import tiny
from mm_core.pipelines.base import TinyBase
from mm_core.pipelines.clip import ClipSettings
from mm_core.pipelines.control import AdapterSettings
from mm_core.pipelines.magic_mirror import MagicMirror
from mm_core.pipelines.preview import preview_image

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
    assert mirror.header.config == tiny.ADAPTER and mirror.header.base_model == base.name == "tiny"
    assert mirror.header.trained.stage == "video"
    assert read_id_encoder_config(base.id_encoder) == tiny.ID_ENCODER
    assert (
        base.tokenizer("A bearded man img turns left.").input_ids
        == tiny.build_tokenizer()("A bearded man img turns left.").input_ids
    )
    config = json.loads((base.folder / "vae" / "config.json").read_text(encoding="utf-8"))
    assert config["scaling_factor"] != 1.0  # measured on its latents


def test_the_preview_shows_the_picture() -> None:
    """The linear map of the trained VAE's latents, on a picture that it was not fitted to."""
    vae = TinyBase().load(torch.float32).vae
    picture = Image.open(Path(__file__).parents[2] / "docs" / "person.png").convert("RGB").resize((64, 64))
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None, :, None].float() / 127.5 - 1
    with torch.no_grad():
        latents = vae.encode(pixels).latent_dist.mean.permute(0, 2, 1, 3, 4) * vae.config.scaling_factor
    preview = preview_image(latents, TinyBase().latent_rgb)
    small = picture.resize(preview.size, Image.Resampling.BOX)
    assert np.corrcoef(np.array(preview).ravel(), np.array(small).ravel())[0, 1] > 0.8


@pytest.fixture(scope="module")
def clips(insightface_root: Path) -> dict[str, np.ndarray]:
    """Clips (F, H, W, 3) of a pale and of a dark person no training has seen, and of nobody: same words, same noise."""
    people = pytest.importorskip("lab.people.render", reason="needs the extra `people`", exc_type=ImportError)
    from lab.people.person import Person
    from lab.people.scene import sample_clip
    from lab.people.traits import HELD_OUT

    analyzer = FaceAnalyzer(insightface_root, "buffalo_sc", device="cpu")
    mirror = MagicMirror(TinyBase(), device=torch.device("cpu"))
    settings = ClipSettings(
        prompt=PROMPT, width=64, height=64, num_frames=9, steps=20, guidance_scale=3.0, dynamic_guidance=False,
        scheduler="ddim",
    )  # fmt: skip
    made = {"nobody": mirror.generate(settings).frames}
    for name, seed in (("pale", HELD_OUT + 7), ("dark", HELD_OUT + 8)):
        photo = people.render_clip(Person.from_seed(seed), sample_clip(seed, 0))[4]
        identity = mirror.identity(analyse_references(analyzer, [photo]))
        made[name] = mirror.generate(settings, identity, AdapterSettings()).frames
    return {name: (frames.numpy() * 255).round().astype(np.uint8) for name, frames in made.items()}


def test_the_face_has_the_persons_skin(clips: dict[str, np.ndarray]) -> None:
    """In the middle of the picture, where the face is."""
    light = {name: float(clip[:, 24:40, 24:40].mean()) for name, clip in clips.items()}
    assert light["pale"] > light["dark"] + 25, light


def test_the_clips_move(clips: dict[str, np.ndarray]) -> None:
    """Not a still: frames differ from the first one by more than coding noise would."""
    for name, clip in clips.items():
        assert np.abs(clip[-1].astype(float) - clip[0]).mean() > 1.5, name
