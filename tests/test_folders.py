"""Names of models: those within the folders are found, none leads out of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from mm_core.errors import CheckpointError
from mm_core.folders import check_name, find_folder, other_folders
from mm_core.names import is_below

LEADING_OUT = [
    "/etc", "//host/share", "C:\\models", "C:models", "\\\\host\\share", "..", "../secret", "a/../../secret",
    "a\\..\\b",
    "", "a\0b", "a\nb", "x" * 300, "x/" * 600, "\ud800", 3, None, ["a"], {"a": 1},
]  # fmt: skip


def make(folder: Path) -> Path:
    (folder / "transformer").mkdir(parents=True)
    (folder / "transformer" / "config.json").write_text("{}")
    return folder


@pytest.mark.parametrize("name", LEADING_OUT, ids=lambda name: repr(name)[:20])
def test_a_name_that_leads_out_is_refused(tmp_path: Path, name: object) -> None:
    with pytest.raises(CheckpointError, match="is no name of a model"):
        check_name(name)
    make(tmp_path / "secret")
    (tmp_path / "models" / "a").mkdir(parents=True)
    with pytest.raises(CheckpointError):
        find_folder([tmp_path / "models"], name)


@pytest.mark.parametrize("name", ["CogVideoX-5b", "THUDM/CogVideoX-5b", "mine v1.0 (fp16)", "人物", "a..b", "a\u3000b"])
def test_a_name_within_passes(name: str) -> None:
    check_name(name)


def test_links_in_the_list_are_the_owners_choice_and_others_are_not_followed(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "models", make(tmp_path / "disk" / "deep" / "er" / "model")
    root.mkdir()
    (root / "linked").symlink_to(elsewhere, target_is_directory=True)
    (root / "disk").symlink_to(tmp_path / "disk", target_is_directory=True)
    inside = make(root / "own" / "a" / "b")
    assert other_folders([root]) == ["linked"]
    assert find_folder([root], "linked") == root / "linked"
    assert find_folder([root], "own/a/b") == inside  # deeper than the list goes, and below it
    assert find_folder([root], "disk/deep/er/model") is None  # the same, and elsewhere
    assert is_below(inside, root) and not is_below(root / "linked", root) and not is_below(root, root)


def test_a_root_may_be_a_link_itself(tmp_path: Path) -> None:
    make(tmp_path / "disk" / "mine" / "a" / "b")
    (tmp_path / "models").symlink_to(tmp_path / "disk", target_is_directory=True)
    assert find_folder([tmp_path / "models"], "mine/a/b") == tmp_path / "models" / "mine" / "a" / "b"
