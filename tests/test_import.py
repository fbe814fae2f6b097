"""ComfyUI imports the pack at its start, on any machine: that costs nothing and needs nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# As ComfyUI does it, under a name made of the folder's path, where nothing but Python is installed.
SCRIPT = """
import importlib.util, sys, threading
before = set(sys.modules)
spec = importlib.util.spec_from_file_location("custom_nodes.some-folder", sys.argv[1] + "/__init__.py",
                                              submodule_search_locations=[sys.argv[1]])
module = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = module
spec.loader.exec_module(module)
assert callable(module.comfy_entrypoint)
assert not hasattr(module, "NODE_CLASS_MAPPINGS")  # ComfyUI would take it and pass over the entry point
third_party = {name.split(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
assert third_party == {"custom_nodes"}, third_party
assert threading.active_count() == 1
"""


def test_the_pack_imports_without_any_package() -> None:
    result = subprocess.run(
        [sys.executable, "-I", "-S", "-c", SCRIPT, str(ROOT)], capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
