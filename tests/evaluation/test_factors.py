"""Modulation analysis, on tiny with its trained adapter."""

from __future__ import annotations

import csv
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from lora_files import write_loras
from PIL import Image

from mm_core.errors import CheckpointError
from mm_core.evaluation.__main__ import main
from mm_core.evaluation.factors import MODALITIES, ScaleFactors, scale_factors
from mm_core.evaluation.systems import Weights, mirror_of
from mm_core.faces.analysis import FaceAnalyzer
from mm_core.faces.references import analyse_references
from mm_core.hosts.cogvideox_diffusers import HOST
from mm_core.models.id_encoder import FaceFeatures
from mm_core.picture_file import read_image
from mm_core.pipelines import tiny
from mm_core.pipelines.identity import Identity
from mm_core.pipelines.lora import Lora

PHOTO = Path(__file__).parents[2] / "mm_core" / "examples" / "woman_1.jpg"
STEPS = 3


@torch.no_grad()
def test_the_scales_are_what_the_blocks_apply(analyzer: FaceAnalyzer) -> None:
    mirror = mirror_of(Weights(model="tiny"), torch.device("cpu"))
    identity = mirror.identity(analyse_references(analyzer, [read_image(PHOTO)]))
    found = scale_factors(mirror, identity, STEPS)
    adapter, transformer = mirror.adapter, mirror.loaded.attached.transformer
    layers = adapter.config.adapted_layers
    assert found.vectors.shape == (STEPS * len(layers) * 3, 2 * adapter.config.hidden_size)
    labels = {name: label.reshape(STEPS, len(layers), 3) for name, label in found.labels.items()}
    vectors = found.vectors.reshape(STEPS, len(layers), 3, 2, -1)
    timestep, layer = torch.tensor([labels["time step"][1, 0, 0]]), labels["layer"][1, 1, 0]
    temb = HOST.time_embedding(transformer, timestep, torch.float32)
    parts = HOST.parts(transformer.transformer_blocks[layer])
    own = adapter.blocks[str(layer)].factors(adapter.id_embedding(identity.id_tokens), temb, parts.video_shift(temb))
    text = parts.modulation(temb)[0, 1] + own.can[0, 6:]  # (6, D)
    for number, expected in ((1, text), (2, own.face[0])):
        assert labels["modality"][1, 1, number] == number
        assert vectors[1, 1, number] == pytest.approx(expected[[1, 4]].numpy(), abs=1e-5)


def test_loras_act_and_identities_of_another_encoder_do_not(tmp_path: Path) -> None:
    """What the clip before had of LoRAs is gone."""
    mirror = mirror_of(Weights(model="tiny"), torch.device("cpu"))
    structure = torch.ones(1, 4, tiny.ADAPTER.clip_hidden_size)
    tokens = torch.ones(1, tiny.ADAPTER.num_id_tokens, tiny.ADAPTER.id_token_dim)
    person = Identity(features=FaceFeatures(tokens, structure), references=())
    lora = Lora.open(write_loras(tmp_path / "loras", tiny.TRANSFORMER)["kohya"], 1.0, mirror.base)
    changed = scale_factors(mirror, person, STEPS, [lora]).vectors
    plain = scale_factors(mirror, person, STEPS).vectors
    assert not np.allclose(changed, plain, atol=1e-3)
    fresh = mirror_of(Weights(model="tiny"), torch.device("cpu"))
    assert np.array_equal(scale_factors(fresh, person, STEPS).vectors, plain)
    with pytest.raises(CheckpointError, match="extracted by another encoder"):
        scale_factors(fresh, replace(person, features=FaceFeatures(tokens[..., :5], structure)), STEPS)


def test_groups_explain_variance_and_lie_apart() -> None:
    modality, random = np.arange(60) % 3, np.random.default_rng(0)
    apart = ScaleFactors(
        vectors=10 * np.eye(3, 40)[modality] + random.normal(size=(60, 40)),
        labels={"modality": modality, "layer": np.arange(60) // 30},
    )
    assert apart.explained()["modality"] > 0.4 and apart.explained()["layer"] < 0.1
    points = apart.embedded()
    nearest = np.linalg.norm(points[:, None] - points[None], axis=2).argsort(axis=1)[:, 1]
    assert (modality[nearest] == modality).all()


def test_a_command_draws_them(tmp_path: Path, insightface_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["factors", "--model=tiny", f"--reference={PHOTO}", f"--steps={STEPS}", "--face-pack=buffalo_sc"]
    argv += [f"--insightface-root={insightface_root}"]
    assert main([*argv, f"--out={tmp_path / 'factors.png'}"]) == 0
    assert "of the variance: time step" in capsys.readouterr().out
    with Image.open(tmp_path / "factors.png") as picture:
        assert picture.width > 1000 and len(picture.convert("RGB").getcolors(1 << 24)) > 50
    with (tmp_path / "factors.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["modality"] for row in rows} == set(MODALITIES) and len(rows) % (3 * STEPS) == 0
    assert len({(row["t-SNE 1"], row["t-SNE 2"]) for row in rows}) == len(rows)
    assert main([*argv, f"--out={tmp_path / 'factors.mp4'}"]) == 2
    assert "call it factors.png" in capsys.readouterr().err


def test_packages_that_lack_are_told_before_a_model_is_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    assert main(["factors", "--model=no such model", f"--reference={PHOTO}", "--out=factors.png"]) == 2
    assert "pip install matplotlib scikit-learn" in capsys.readouterr().err
