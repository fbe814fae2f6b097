"""Which photos and videos belong together."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from mm_core.errors import MagicMirrorError, NoFaceError
from mm_core.evaluation.people import find_references, find_videos, identity_of, load_person, mean_face


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def test_references_in_folders_and_by_name(tmp_path):
    touch(tmp_path, "anna/x.jpg", "anna/y.PNG", "bob_1.jpg", "bob-2.jpeg", "carl.webp", "1.jpg", "notes.txt")
    found = {name: [path.name for path in paths] for name, paths in find_references(tmp_path).items()}
    assert found == {
        "anna": ["x.jpg", "y.PNG"],
        "bob": ["bob-2.jpeg", "bob_1.jpg"],
        "carl": ["carl.webp"],
        "1": ["1.jpg"],
    }


@pytest.mark.parametrize(
    ("video", "identity"),
    (
        ("ann_1.mp4", "ann"),
        ("ann.mp4", "ann"),
        ("anna-walks.webm", "anna"),
        ("anna7.mp4", "anna"),
        ("ann/anna.mp4", "ann"),
        ("seed 3/anna 1.mp4", "anna"),
    ),
)
def test_videos_belong_to_the_longest_name_or_their_folder(tmp_path, video, identity):
    assert identity_of(tmp_path / video, tmp_path, ["ann", "anna"]) == identity


def test_a_stranger_and_empty_folders_are_errors(tmp_path):
    with pytest.raises(MagicMirrorError, match=r"annabel\.mp4 belongs to no identity.*ann, anna"):
        identity_of(tmp_path / "annabel.mp4", tmp_path, ["anna", "ann"])
    for find in (find_references, find_videos):
        with pytest.raises(MagicMirrorError, match="holds no"):
            find(tmp_path)
        with pytest.raises(MagicMirrorError, match="does not exist"):
            find(tmp_path / "nowhere")


def test_a_photo_without_a_face_is_named(tmp_path, analyzer):
    from PIL import Image

    Image.new("RGB", (200, 200), "grey").save(tmp_path / "wall.jpg")
    with pytest.raises(NoFaceError, match=r"wall\.jpg.*no face"):
        load_person(analyzer, "wall", [tmp_path / "wall.jpg"])


def test_mean_face_is_of_normalised_embeddings(tmp_path, analyzer, photographs):
    for name in ("person_a_2.jpg", "person_b_1.jpg"):
        shutil.copy(photographs / name, tmp_path)
    centre = mean_face(analyzer, tmp_path)
    assert centre.shape == (512,)
    assert np.linalg.norm(centre) == pytest.approx(np.sqrt(0.5), abs=0.05)  # two nearly orthogonal people
