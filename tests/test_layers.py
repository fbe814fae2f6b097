"""Who may import whom, and what may not stand in the code at all."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACK = sorted([ROOT / "__init__.py", *ROOT.glob("mm_core/**/*.py"), *ROOT.glob("nodes/**/*.py")])
SOURCES = [*PACK, *sorted(ROOT.glob("lab/**/*.py"))]

# Each package, and the parts of the project that it may use beside itself and `errors`.
MAY_IMPORT = {
    "mm_core.errors": set(),
    "mm_core.choices": set(),
    "mm_core.numerics": set(),
    "mm_core.out_of_memory": set(),
    "mm_core.counting": set(),
    "mm_core.limits": set(),
    "mm_core.names": set(),
    "mm_core.json_file": set(),
    "mm_core.picture_file": set(),
    "mm_core.progress": set(),
    "mm_core.settings_file": set(),
    "mm_core.files": set(),
    "mm_core.filenames": {"mm_core.files"},
    "mm_core.playback": set(),
    "mm_core.video": {"mm_core.files", "mm_core.playback"},
    "mm_core.video_reader": set(),
    "mm_core.faces": set(),
    "mm_core.models": set(),
    "mm_core.hosts": {"mm_core.models"},
    "mm_core.data": {
        *("mm_core.models", "mm_core.checkpoints", "mm_core.pipelines", "mm_core.faces", "mm_core.memory"),
        "mm_core.files",
    },
    "mm_core.curation": {
        *("mm_core.data", "mm_core.evaluation", "mm_core.faces", "mm_core.files", "mm_core.pipelines", "mm_core.video"),
        *("mm_core.models", "mm_core.checkpoints", "mm_core.memory"),  # PhotoMaker, which makes pairs
    },
    "mm_core.evaluation": {
        *("mm_core.faces", "mm_core.files", "mm_core.video", "mm_core.checkpoints", "mm_core.pipelines"),
        *("mm_core.hosts", "mm_core.memory"),
    },
    "mm_core.checkpoints": {"mm_core.models", "mm_core.files"},
    "mm_core.memory": {"mm_core.models"},
    "mm_core.pipelines": {
        *("mm_core.models", "mm_core.hosts", "mm_core.faces", "mm_core.checkpoints", "mm_core.memory"),
        *("mm_core.files", "mm_core.numerics", "mm_core.out_of_memory", "mm_core.counting"),
    },
    "mm_core.folders": {"mm_core.faces", "mm_core.pipelines"},
    "mm_core.doctor": {"mm_core.checkpoints", "mm_core.faces", "mm_core.folders", "mm_core.pipelines"},
    "mm_core.training.__main__": {"mm_core.release"},
    "mm_core.training": {
        *("mm_core.models", "mm_core.checkpoints", "mm_core.data", "mm_core.pipelines", "mm_core.faces"),
        *("mm_core.files", "mm_core.hosts", "mm_core.memory", "mm_core.video"),
    },
    "mm_core.planning": {
        *("mm_core.training", "mm_core.models", "mm_core.checkpoints", "mm_core.data", "mm_core.pipelines"),
        *("mm_core.files", "mm_core.counting", "mm_core.memory"),
    },
    # With the command line of all of them.
    "mm_core.release": {
        *("mm_core.training", "mm_core.planning", "mm_core.checkpoints", "mm_core.data", "mm_core.pipelines"),
        *("mm_core.faces", "mm_core.files", "mm_core.video", "mm_core.evaluation"),
    },
    "nodes": {
        *("mm_core.doctor", "mm_core.folders"),
        *("mm_core.pipelines", "mm_core.faces", "mm_core.checkpoints", "mm_core.memory", "mm_core.video"),
        *("mm_core.evaluation", "mm_core.hosts", "mm_core.models", "mm_core.numerics", "mm_core.out_of_memory"),
        *("mm_core.filenames", "mm_core.files", "mm_core.playback"),
    },
    "mm_core.benchmark": {
        *("mm_core.counting", "mm_core.models", "mm_core.hosts", "mm_core.memory", "mm_core.pipelines"),
        "mm_core.files",
    },
    # Beside the product, which knows nothing of it.
    "lab": {
        *("mm_core.training", "mm_core.data", "mm_core.evaluation", "mm_core.pipelines", "mm_core.checkpoints"),
        *("mm_core.curation", "mm_core.video"),
        *("mm_core.models", "mm_core.faces", "mm_core.files", "mm_core.memory", "mm_core.release"),
    },
}
FOR_ALL = {
    *("mm_core.errors", "mm_core.choices", "mm_core.limits", "mm_core.names", "mm_core.progress"),
    *("mm_core.json_file", "mm_core.picture_file", "mm_core.settings_file", "mm_core.video_reader"),
}
COMFYUI = {"comfy", "comfy_api", "comfy_execution", "folder_paths", "server", "execution", "nodes"}
DIFFUSERS_HOST = "mm_core/hosts/cogvideox_diffusers.py"


def imports(path: Path) -> set[str]:
    """Absolute names of everything a file imports, relative imports resolved against the repository."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1]
            stem = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{stem}.{alias.name}".lstrip(".") for alias in node.names}
    return found


def unit(name: str) -> str | None:
    """`mm_core.models.block.adapted_block` -> `mm_core.models`; None for a name outside the project."""
    return next((u for u in MAY_IMPORT if name == u or name.startswith(u + ".")), None)


def path_id(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", SOURCES, ids=path_id)
def test_imports_point_one_way(path: Path) -> None:
    own = unit(".".join(path.relative_to(ROOT).with_suffix("").parts))
    if own is None:  # __init__ files and the command line may use everything below them
        return
    allowed = MAY_IMPORT[own] | {own} | FOR_ALL
    wrong = sorted(name for name in imports(path) if unit(name) and unit(name) not in allowed)
    assert not wrong


def test_no_circles() -> None:
    """No file needs itself, by whatever way: imports within functions and for type checkers count too."""
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in SOURCES}

    def modules(name: str) -> set[str]:
        """The file behind an imported name: a module itself, or what is taken from one."""
        return {name, name.rpartition(".")[0]} & names.keys()

    needs = {name: {m for found in imports(path) for m in modules(found)} for name, path in names.items()}
    while leaves := {name for name, wanted in needs.items() if not wanted}:
        needs = {name: wanted - leaves for name, wanted in needs.items() if name not in leaves}
    assert not needs, "these import each other, or are above such files"


@pytest.mark.parametrize("path", SOURCES, ids=path_id)
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 400
    functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    lengths = {function.name: function.end_lineno - function.lineno + 1 for function in functions}
    assert not {name: length for name, length in lengths.items() if length >= 60}


@pytest.mark.parametrize("path", [p for p in PACK if "mm_core" in p.parts], ids=path_id)
def test_core_knows_no_comfyui(path: Path) -> None:
    assert not {name for name in imports(path) if name.split(".")[0] in COMFYUI}


@pytest.mark.parametrize("path", [p for p in PACK if {"models", "hosts"} & set(p.parts)], ids=path_id)
def test_only_its_host_knows_diffusers(path: Path) -> None:
    knows = any(name.split(".")[0] == "diffusers" for name in imports(path))
    assert knows == (path_id(path) == DIFFUSERS_HOST)


@pytest.mark.parametrize("path", [p for p in PACK if "nodes" in p.parts], ids=path_id)
def test_only_the_runtime_and_the_native_models_touch_comfyui_internals(path: Path) -> None:
    internals = {name for name in imports(path) if name.split(".")[0] in COMFYUI - {"comfy_api", "nodes"}}
    assert path.name.startswith(("runtime", "native_")) or not internals


@pytest.mark.parametrize("path", PACK, ids=path_id)
def test_everything_inside_the_pack_is_imported_relatively(path: Path) -> None:
    """Inside ComfyUI the pack's module name comes from its folder; absolute names of its own would not be found."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    absolute = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level == 0}
    assert not {name for name in absolute if name.split(".")[0] in {"mm_core", "nodes"}}


@pytest.mark.parametrize("path", SOURCES, ids=path_id)
def test_nothing_unsafe(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for call in (n for n in ast.walk(tree) if isinstance(n, ast.Call)):
        name = ast.unparse(call.func)
        assert name not in {"eval", "exec", "compile", "os.system", "pickle.load", "pickle.loads"}
        assert not name.startswith("subprocess.")
        if name == "torch.load":
            assert {k.arg: ast.unparse(k.value) for k in call.keywords}.get("weights_only") == "True"
