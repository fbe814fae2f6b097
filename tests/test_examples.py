"""The people who come with the pack."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest

from mm_core.examples import PEOPLE, example_identity, example_photos

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("person", PEOPLE)
def test_photos_and_identity_are_of_one_person(person: str) -> None:
    """The identity is of tiny's encoder as it is now; if this fails, run scripts/make_examples.py."""
    photos, identity = example_photos(person), example_identity(person)
    assert photos.shape == (2, 384, 384, 3)
    assert len(identity.references) == 2 and identity.face_pack == "buffalo_sc"
    (other,) = (example_identity(name) for name in PEOPLE if name != person)
    own, strange = identity.references[0].face.normed_embedding, other.references[0].face.normed_embedding
    assert own @ identity.references[1].face.normed_embedding > 0.7 > 0.5 > own @ strange


def test_the_crops_are_of_the_photos(insightface_root: Path) -> None:
    from mm_core.faces.analysis import FaceAnalyzer

    found = FaceAnalyzer(insightface_root, "buffalo_sc").detect(example_photos("man")[0])
    assert len(found) == 1 and found[0].size > 112
    kept = example_identity("man").references[0].face
    assert np.abs(found[0].box - kept.box).max() < 2 and found[0].normed_embedding @ kept.normed_embedding > 0.98


def test_the_node_offers_them() -> None:
    tree = ast.parse((ROOT / "nodes" / "examples.py").read_text(encoding="utf-8"))
    (names,) = (node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "PEOPLE")
    assert tuple(ast.literal_eval(names)) == PEOPLE
