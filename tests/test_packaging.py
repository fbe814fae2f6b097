"""What ComfyUI's Manager and the registry read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads pyproject.toml")
ROOT = Path(__file__).parents[1]


def requirements() -> list[str]:
    return [line.strip() for line in (ROOT / "requirements.txt").read_text().splitlines() if line.strip()]


def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_both_lists_of_dependencies_agree() -> None:
    assert pyproject()["project"]["dependencies"] == requirements()


def test_requirements_have_lower_bounds_only() -> None:
    assert not [line for line in requirements() if any(sign in line.split(";")[0] for sign in ("==", "<", "~=", "@"))]


def test_the_gpu_runtime_comes_last() -> None:
    """It and onnxruntime, which insightface brings, write the same files; installed line by line, the last one wins."""
    names = [line.split(";")[0].split(">")[0].strip() for line in requirements()]
    assert names[-1] == "onnxruntime-gpu"
    assert "insightface" in names[:-1]


def test_the_registry_finds_the_pictures() -> None:
    """At addresses in the repository on its main branch, in the sizes that the registry takes."""
    data = pyproject()
    raw = data["project"]["urls"]["Repository"].replace("github.com", "raw.githubusercontent.com") + "/main/"
    sizes = {}
    for key in ("Icon", "Banner"):
        address = data["tool"]["comfy"][key]
        assert address.startswith(raw)
        with Image.open(ROOT / address.removeprefix(raw)) as image:
            sizes[key] = image.size
    width, height = sizes["Icon"]
    assert width == height <= 400
    width, height = sizes["Banner"]
    assert width * 9 == height * 21


def test_the_archive_holds_what_the_pack_needs() -> None:
    """Each line of .comfyignore is about something at the top, and none of it is code or weights that nodes use."""
    lines = [line for line in (ROOT / ".comfyignore").read_text().splitlines() if not line.startswith("#")]
    assert all(line.startswith("/") and any(ROOT.glob(line.strip("/"))) for line in lines)
    needed = {
        "__init__.py",
        "nodes",
        "mm_core",
        "workflows",
        "subgraphs",
        "requirements.txt",
        "pyproject.toml",
        "LICENSE",
    }
    assert not needed & {line.strip("/") for line in lines}


def test_the_changes_begin_with_this_version() -> None:
    newest = next(line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## "))
    assert newest.removeprefix("## ").split(",")[0].split()[0] == pyproject()["project"]["version"]


def test_the_readme_is_short_and_its_links_lead_somewhere() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) <= 900
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), (page.name, link)
