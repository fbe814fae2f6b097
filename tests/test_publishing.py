"""What the registry's tools say of the archive, and what may not stand in it at all."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from environment import PACK_FOLDER

BUILTINS = {"eval", "exec", "compile", "__import__", "input", "breakpoint"}
MODULES = {
    *("subprocess", "pip", "ctypes", "marshal", "shelve", "dill", "cloudpickle"),
    *("requests", "urllib", "http", "httpx", "aiohttp", "socket", "ssl", "ftplib", "smtplib", "telnetlib"),
    *("webbrowser", "paramiko"),
}
# Called where the user allowed a download, and imported nowhere else.
DOWNLOADS = {
    ("mm_core/pipelines/base.py", "huggingface_hub.snapshot_download"),
    ("mm_core/checkpoints/photomaker.py", "huggingface_hub.hf_hub_download"),
    ("mm_core/faces/packs.py", "insightface.utils.storage.download"),
}
CALLS = {"os.system", "os.popen", "os.execv", "os.spawnv", "pickle.load", "pickle.loads", "shutil.unpack_archive"}


@pytest.fixture(scope="module")
def sources(unpacked: Path) -> dict[str, ast.Module]:
    """The archive's Python files, parsed, by name."""
    return {
        path.relative_to(unpacked).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
        for path in sorted(unpacked.rglob("*.py"))
    }


def test_the_archive(unpacked: Path) -> None:
    """All that nodes need is in it, nothing that only developers do, and it stays small."""
    top = {path.name for path in unpacked.iterdir()}
    assert {"__init__.py", "nodes", "mm_core", "workflows", "subgraphs", "locales", "web", "LICENSE"} <= top
    assert not top & {"tests", "scripts", ".ci", ".github"}
    assert (unpacked / "mm_core" / "weights" / "tiny" / "adapter.safetensors").is_file()
    assert sum(path.stat().st_size for path in unpacked.rglob("*") if path.is_file()) < 60e6


def test_the_registry_accepts_it(comfy_cli: Callable[..., str], unpacked: Path) -> None:
    assert "All validation checks passed" in comfy_cli("node", "validate", cwd=unpacked)


@pytest.mark.parametrize("text", [b"os.environ.get(", b"importlib.import_module", b".connect("])
def test_no_text_that_the_registry_flags(unpacked: Path, text: bytes) -> None:
    """Its scan marks a version for a single one of these, and ComfyUI Manager then goes on serving the older one."""
    suffixes = {".py", ".js", ".md", ".json", ".toml", ".yaml"}
    files = [path for path in unpacked.rglob("*") if path.suffix in suffixes]
    assert len(files) > 100
    assert [path.name for path in files if text in path.read_bytes()] == []


def test_no_import_of_comfyui_breaks(validators: Path, unpacked: Path, comfyui_path: Path, tmp_path: Path) -> None:
    """comfy-import-guard resolves every `comfy.*` name against the current ComfyUI's sources."""
    clone = tmp_path / "ComfyUI"
    shutil.copytree(comfyui_path, clone, ignore=shutil.ignore_patterns(".git", "__pycache__"))
    commit = "git init -q && git add -Af && git -c user.name=t -c user.email=t@t commit -qm ComfyUI"
    subprocess.run(f"{commit} && git update-ref refs/remotes/origin/master HEAD", shell=True, cwd=clone, check=True)
    shutil.copytree(unpacked, tmp_path / "install" / "custom_nodes" / PACK_FOLDER)
    options = ("--offline", "--json", "--cache-dir", str(tmp_path), "check", "--no-update", "--strict")
    report = run_tool(validators, "comfy_import_guard.cli", *options, "--comfy-dir", str(tmp_path / "install"))
    (pack,) = report["packs"]
    assert pack["verdict"] == "SAFE" and pack["references"] > 20
    assert not pack["unparseable"] and not pack["unresolvable"]


def test_no_banned_call(sources: dict[str, ast.Module]) -> None:
    """No code from text, no processes, no pickles, no network but huggingface_hub's."""
    found = []
    for name, tree in sources.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                weights_only = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
                if called in BUILTINS | CALLS or (called == "torch.load" and not weights_only):
                    found.append(f"{name}:{node.lineno} {called}")
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                imported = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                found += [f"{name}:{node.lineno} import {m}" for m in imported if m and m.split(".")[0] in MODULES]
    assert not found


def test_only_downloads_reach_for_the_network(sources: dict[str, ast.Module]) -> None:
    found = set()
    for name, tree in sources.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                found |= {(name, f"{node.module}.{alias.name}") for alias in node.names}
            elif isinstance(node, ast.Import):
                found |= {(name, alias.name) for alias in node.names}
    reach = ("huggingface_hub", "insightface.utils.storage", "torch.hub")
    assert {(name, imported) for name, imported in found if imported.startswith(reach)} == DOWNLOADS


def run_tool(python: Path, module: str, *arguments: str) -> Any:
    """The JSON that a tool's `main` prints; its exit code must be 0."""
    code = f"import sys; from {module} import main; sys.exit(main())"
    result = subprocess.run([python, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(result.stdout)
