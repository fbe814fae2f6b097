"""What ComfyUI's Manager and the registry read."""

from __future__ import annotations

from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads pyproject.toml")
ROOT = Path(__file__).parents[1]


def requirements() -> list[str]:
    return [line.strip() for line in (ROOT / "requirements.txt").read_text().splitlines() if line.strip()]


def test_both_lists_of_dependencies_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["dependencies"] == requirements()


def test_requirements_have_lower_bounds_only() -> None:
    assert not [line for line in requirements() if any(sign in line.split(";")[0] for sign in ("==", "<", "~=", "@"))]


def test_the_gpu_runtime_comes_last() -> None:
    """It and onnxruntime, which insightface brings, write the same files; installed line by line, the last one wins."""
    names = [line.split(";")[0].split(">")[0].strip() for line in requirements()]
    assert names[-1] == "onnxruntime-gpu"
    assert "insightface" in names[:-1]
