"""Identity files: exact round trips, and a clear refusal of everything else."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import untrained_tiny
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import assert_near
from torch import Tensor

from mm_core.checkpoints.photomaker import fingerprint, read_fingerprint, save_id_encoder
from mm_core.errors import CheckpointError
from mm_core.faces.analysis import Face
from mm_core.faces.references import PhotoReport, Reference
from mm_core.models.id_encoder import FaceFeatures
from mm_core.pipelines import tiny
from mm_core.pipelines.base import FolderBase, TinyBase
from mm_core.pipelines.identity import Identity
from mm_core.pipelines.identity_file import THUMBNAIL, load_identity, save_identity
from mm_core.pipelines.magic_mirror import MagicMirror

ENCODER, OTHER_ENCODER = "ab" * 32, "cd" * 32
PHOTOS = 2
NUMBERS = ("score", "size", "yaw", "pitch", "roll", "sharpness")
TENSORS = {
    "id_tokens": (torch.float32, (PHOTOS, 2, 12)),
    "structure_tokens": (torch.float32, (PHOTOS, 5, 6)),
    "embeddings": (torch.float32, (PHOTOS, 512)),
    "boxes": (torch.float32, (PHOTOS, 4)),
    "landmarks": (torch.float32, (PHOTOS, 5, 2)),
    "crops": (torch.uint8, (PHOTOS, 224, 224, 3)),
}


def build_identity() -> Identity:
    """Somebody in two photos; all numbers differ, and few of them are short in decimal."""
    random = np.random.default_rng(0)

    def reference(name: str, similarity: float | None, warnings: tuple[str, ...]) -> Reference:
        numbers = dict(zip(NUMBERS, random.normal(size=len(NUMBERS)).tolist(), strict=True))
        face = Face(
            box=random.normal(size=4).astype(np.float32),
            landmarks=random.normal(size=(5, 2)).astype(np.float32),
            embedding=random.normal(size=512).astype(np.float32),
            **numbers,
        )
        report = PhotoReport(name=name, faces_seen=3, similarity=similarity, warnings=warnings, **numbers)
        return Reference(face=face, crop=random.integers(0, 256, (224, 224, 3), dtype=np.uint8), report=report)

    generator = torch.Generator().manual_seed(0)
    return Identity(
        features=FaceFeatures(
            id_tokens=torch.randn(PHOTOS, 2, 12, generator=generator),
            structure_tokens=torch.randn(PHOTOS, 5, 6, generator=generator),
        ),
        references=(
            reference("photo 1", 1 / 3, ()),
            reference("Zoë at the lake.jpg", None, ("the face is blurred", "the face is turned away")),
        ),
        encoder=ENCODER,
        face_pack="buffalo_sc",
    )


def weighted(*weights: float) -> Identity:
    """That person, the photos counting differently."""
    identity = build_identity()
    references = zip(identity.references, weights, strict=True)
    return replace(identity, references=tuple(replace(reference, weight=weight) for reference, weight in references))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """An identity file."""
    path = tmp_path / "people" / "zoe.safetensors"
    save_identity(build_identity(), path)
    return path


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def rewrite(
    path: Path, change: Callable[[dict[str, Tensor]], Any] = lambda tensors: None, **metadata: str | None
) -> None:
    """Write the file again with other tensors or metadata; None leaves an entry out."""
    # Copies: what safetensors gives may be the file itself.
    tensors, entries = {key: tensor.clone() for key, tensor in load_file(path).items()}, metadata_of(path) | metadata
    change(tensors)
    save_file(tensors, path, metadata={key: value for key, value in entries.items() if value is not None})


def refusal(path: Path, encoder: str = ENCODER) -> str:
    with pytest.raises(CheckpointError) as error:
        load_identity(path, encoder=encoder)
    return str(error.value)


def test_round_trip(path: Path) -> None:
    """Every bit of every tensor and number comes back."""
    saved, loaded = build_identity(), load_identity(path, encoder=ENCODER)
    assert (loaded.encoder, loaded.face_pack) == (saved.encoder, saved.face_pack)
    for ours, theirs in zip(loaded.features, saved.features, strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    for ours, theirs in zip(loaded.references, saved.references, strict=True):
        assert ours.report == theirs.report
        assert ours.crop.dtype == np.uint8 and np.array_equal(ours.crop, theirs.crop)
        for name in ("box", "landmarks", "embedding"):
            found, expected = getattr(ours.face, name), getattr(theirs.face, name)
            assert found.dtype == expected.dtype and np.array_equal(found, expected)
        assert [getattr(ours.face, name) for name in NUMBERS] == [getattr(theirs.face, name) for name in NUMBERS]
    assert loaded.report == saved.report and torch.equal(loaded.id_tokens, saved.id_tokens)


def test_the_file_is_what_the_page_says(path: Path) -> None:
    """docs/identity_file.md: keys, types and shapes."""
    metadata = metadata_of(path)
    assert metadata.keys() == {"format", "format_version", "encoder", "face_pack", "reports", THUMBNAIL}
    assert (metadata["format"], metadata["format_version"]) == ("magicmirror-identity", "1")
    assert (metadata["encoder"], metadata["face_pack"]) == (ENCODER, "buffalo_sc")
    assert [report["name"] for report in json.loads(metadata["reports"])] == ["photo 1", "Zoë at the lake.jpg"]
    assert {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in load_file(path).items()} == TENSORS


def test_weights_come_back(tmp_path: Path) -> None:
    """To the last bit, in a file that says so: code that knows no weights must not take the photos for equal."""
    saved = weighted(1, 1 / 3)
    save_identity(saved, tmp_path / "mixed.safetensors")
    metadata = metadata_of(tmp_path / "mixed.safetensors")
    assert (metadata["format_version"], json.loads(metadata["weights"])) == ("2", [1.0, 1 / 3])
    loaded = load_identity(tmp_path / "mixed.safetensors", encoder=ENCODER)
    assert torch.equal(loaded.weights, saved.weights) and torch.equal(loaded.id_tokens, saved.id_tokens)
    assert loaded.report == saved.report and loaded.report.endswith("weights: photo 1 75%, Zoë at the lake.jpg 25%")


def test_equal_weights_are_none(tmp_path: Path) -> None:
    """Photos that count the same make the file, and the tokens, that they make without weights."""
    save_identity(weighted(0.3, 0.3), tmp_path / "equal.safetensors")
    assert metadata_of(tmp_path / "equal.safetensors")["format_version"] == "1"
    loaded = load_identity(tmp_path / "equal.safetensors", encoder=ENCODER)
    assert loaded.weights is None and torch.equal(loaded.id_tokens, build_identity().id_tokens)


def test_the_weighted_mean(path: Path) -> None:
    one, other = build_identity().features.id_tokens
    assert_near(weighted(3, 1).id_tokens, (3 * one + other)[None] / 4, 1e-6)
    assert_near(weighted(30, 10).id_tokens, weighted(3, 1).id_tokens, 1e-6)
    assert_near(weighted(100, 1e-12).id_tokens, one[None], 1e-6)


def test_an_older_file_is_read(path: Path) -> None:
    """What this code wrote before there were weights and pictures."""
    rewrite(path, **{THUMBNAIL: None})
    assert metadata_of(path)["format_version"] == "1"
    loaded = load_identity(path, encoder=ENCODER)
    assert loaded.weights is None and torch.equal(loaded.id_tokens, build_identity().id_tokens)


def test_the_picture_is_the_first_crop(path: Path) -> None:
    kind, _, picture = metadata_of(path)["modelspec.thumbnail"].partition(",")
    assert kind == "data:image/jpeg;base64"
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture))))
    crop = build_identity().crops[0]
    assert shown.shape == crop.shape
    assert np.corrcoef(shown.ravel(), crop.ravel())[0, 1] > 0.5  # noise, which JPEG keeps badly


def test_more_metadata_is_kept_and_changes_nothing(path: Path) -> None:
    save_identity(build_identity(), path, metadata={"workflow": '{"nodes": []}', "format": "another"})
    assert metadata_of(path)["workflow"] == '{"nodes": []}'
    assert load_identity(path, encoder=ENCODER).report == build_identity().report


def test_the_file_may_be_replaced_while_its_identity_is_used(path: Path) -> None:
    loaded = load_identity(path, encoder=ENCODER)
    path.write_bytes(bytes(path.stat().st_size))
    assert torch.equal(loaded.features.id_tokens, build_identity().features.id_tokens)
    assert np.array_equal(loaded.crops, build_identity().crops)


@pytest.mark.parametrize("unknown", [{"encoder": None}, {"face_pack": None}, {"references": ()}])
def test_only_a_whole_identity_is_saved(tmp_path: Path, unknown: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"MagicMirror\.identity"):
        save_identity(replace(build_identity(), **unknown), tmp_path / "nobody.safetensors")
    assert not list(tmp_path.iterdir())


def test_another_encoder(path: Path) -> None:
    message = refusal(path, OTHER_ENCODER)
    assert path.name in message and ENCODER[:16] in message and OTHER_ENCODER[:16] in message
    assert "Extract the identity" in message


@pytest.mark.parametrize("size", [0, 1, 5, 200, -1], ids=["empty", "one byte", "length", "header", "body"])
def test_truncated_file(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])
    assert "damaged or cut short" in refusal(path)


def test_missing_file_and_pickle(path: Path, tmp_path: Path) -> None:
    assert "There is no file" in refusal(tmp_path / "none.safetensors")
    torch.save({"id_tokens": torch.zeros(1)}, path)
    assert "is a pickle" in refusal(path)


REPORT = {
    "name": "photo 1", "score": 0.8, "size": 200.0, "yaw": 1.0, "pitch": 2.0, "roll": 3.0, "sharpness": 400.0,
    "faces_seen": 1, "similarity": 0.5, "warnings": [],
}  # fmt: skip


def reports(**changed: Any) -> str:
    return json.dumps([REPORT, REPORT | changed])


@pytest.mark.parametrize(
    ("metadata", "named"),
    [
        ({"format": "magicmirror-adapter"}, ["'magicmirror-adapter'", "'magicmirror-identity'", "Save Identity"]),
        ({"format": None}, ["format=None"]),
        ({"format_version": "3"}, ["'3'", "'1' and '2'", "Update"]),
        ({"format_version": "2"}, ["lacks", "weights"]),
        ({"format_version": "2", "weights": "{"}, ["`weights` is {", "2 numbers above 0"]),
        ({"format_version": "2", "weights": "7"}, ["`weights` is 7"]),
        ({"format_version": "2", "weights": "[1.0]"}, ["2 numbers"]),
        ({"format_version": "2", "weights": "[1.0, 0.0]"}, ["above 0, at most 100"]),
        ({"format_version": "2", "weights": "[1.0, NaN]"}, ["NaN", "2 numbers"]),
        ({"format_version": "2", "weights": "[1.0, 101.0]"}, ["at most 100"]),
        ({"format_version": "2", "weights": '[1.0, "2"]'}, ["2 numbers"]),
        ({"format_version": None}, ["None"]),
        ({"encoder": None, "reports": None}, ["lacks", "encoder, reports"]),
        ({"face_pack": None}, ["face_pack"]),
        ({"reports": "{"}, ["`reports`"]),
        ({"reports": "7"}, ["`reports`"]),
        ({"reports": "[]"}, ["`reports`", "none"]),
        ({"reports": "[7]"}, ["exactly the fields"]),
        ({"reports": json.dumps([{}, {}])}, ["exactly the fields", "faces_seen"]),
        ({"reports": reports(extra=1)}, ["exactly the fields"]),
        ({"reports": reports(score="high")}, ["high", "finite"]),
        ({"reports": reports(yaw=float("nan"))}, ["NaN", "no number"]),
        ({"reports": "[" * 20_000}, ["`reports`", "nested too deeply"]),
        ({"reports": reports(similarity=True)}, ["finite"]),
        ({"reports": reports(faces_seen=0)}, ["faces_seen is 0"]),
        ({"reports": reports(faces_seen=1.0)}, ["faces_seen is 1.0"]),
        ({"reports": reports(name=None)}, ["text"]),
        ({"reports": reports(warnings="careful")}, ["text"]),
        ({"reports": reports(warnings=[1])}, ["text"]),
        ({"reports": json.dumps([REPORT])}, ["id_tokens", "(2, 2, 12)", "(1, any, any)"]),
    ],
)
def test_wrong_metadata(path: Path, metadata: dict[str, str | None], named: list[str]) -> None:
    rewrite(path, **metadata)
    message = refusal(path)
    assert [text for text in (path.name, *named) if text not in message] == []


def with_tensor(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: change(tensors[name]).contiguous().clone()})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda tensors: tensors.pop("boxes"), ["missing boxes", "unexpected none"]),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), ["missing none", "unexpected extra"]),
        (with_tensor("embeddings", lambda t: t[:, :256]), ["embeddings", "(2, 256)", "(2, 512)"]),
        (with_tensor("embeddings", lambda t: t[:1]), ["embeddings", "(1, 512)", "(2, 512)"]),
        (with_tensor("landmarks", lambda t: t.flatten(1)), ["landmarks", "(2, 10)", "(2, 5, 2)"]),
        (with_tensor("crops", lambda t: t[:, :112]), ["crops", "(2, 112, 224, 3)"]),
        (with_tensor("crops", lambda t: t.float()), ["crops", "F32", "U8"]),
        (with_tensor("id_tokens", lambda t: t.half()), ["id_tokens", "F16", "F32"]),
        (with_tensor("id_tokens", lambda t: t[:, :0]), ["id_tokens", "(2, 0, 12)"]),
        (with_tensor("structure_tokens", lambda t: t * float("nan")), ["structure_tokens", "no numbers"]),
    ],
)
def test_wrong_tensors(path: Path, change: Callable[[dict[str, Tensor]], Any], named: list[str]) -> None:
    rewrite(path, change)
    message = refusal(path)
    assert [text for text in (path.name, *named) if text not in message] == []


def test_a_fingerprint_is_of_the_weights(tmp_path: Path) -> None:
    """A half precision file of an encoder is that encoder; one weight changed by a little, or renamed, is another."""
    encoder = untrained_tiny.build_id_encoder(torch.float32)
    weights = encoder.state_dict()
    expected = fingerprint(weights)
    save_id_encoder(encoder, tmp_path / "encoder.safetensors", tiny.ID_ENCODER)
    assert len(expected) == 64 and read_fingerprint(tmp_path / "encoder.safetensors") == expected
    assert fingerprint(dict(reversed(weights.items()))) == expected

    name, weight = next((name, weight) for name, weight in weights.items() if weight.ndim == 2)
    changed = weight.clone()
    changed[0, 0] += 0.01
    assert fingerprint(weights | {name: changed}) != expected
    assert fingerprint(weights | {name: weight.reshape(weight.shape[::-1])}) != expected
    renamed = {key + "_" * (key == name): tensor for key, tensor in weights.items()}
    assert fingerprint(renamed) != expected


def test_a_model_tells_its_encoder_at_every_precision(tmp_path: Path) -> None:
    path, cpu = tmp_path / "encoder.safetensors", torch.device("cpu")
    save_id_encoder(untrained_tiny.build_id_encoder(torch.float32), path, tiny.ID_ENCODER)
    found = {
        MagicMirror(TinyBase(), id_encoder=path, precision=precision, device=cpu).id_encoder.fingerprint
        for precision in ("fp32", "bf16")
    }
    assert found == {read_fingerprint(path)}


def test_a_person_made_by_a_model_names_it_and_comes_back(tmp_path: Path) -> None:
    """What `MagicMirror.identity` makes can be saved as it is, and loads for the same model only."""
    mirror = MagicMirror(TinyBase(), device=torch.device("cpu"))
    made = mirror.identity(list(build_identity().references), "buffalo_sc")
    assert (made.encoder, made.face_pack) == (mirror.id_encoder.fingerprint, "buffalo_sc")
    save_identity(made, tmp_path / "made.safetensors")
    loaded = load_identity(tmp_path / "made.safetensors", encoder=mirror.id_encoder.fingerprint)
    assert torch.equal(loaded.features.structure_tokens, made.features.structure_tokens)
    refusal(tmp_path / "made.safetensors", OTHER_ENCODER)


def test_no_encoder_has_no_fingerprint(folders: dict[str, Path]) -> None:
    with pytest.raises(CheckpointError, match="No ID encoder"):
        MagicMirror(FolderBase(folders["5b"]), device=torch.device("cpu")).id_encoder.fingerprint  # noqa: B018
