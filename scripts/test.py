"""Set up what the tests need, then run ruff and pytest; arguments are handed to pytest.

Without arguments all tests run, a file on each core; those that arguments name run one after the other.
With `--oldest`, those without ComfyUI that concern them run with the oldest packages that requirements.txt allows.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import environment

OLDEST = (
    *("tests/pipelines", "tests/models", "tests/checkpoints", "tests/faces"),
    *("tests/training/test_loop.py", "tests/training/test_adapter_training.py"),
    *("tests/test_memory.py", "tests/test_import.py", "tests/test_video.py", "tests/test_cli.py"),
)
WORKERS = min(max(2, os.cpu_count() or 1), 4)  # each takes some gigabytes
SIDE_BY_SIDE = ("-n", str(WORKERS), "--dist", "loadfile", "--no-loadscope-reorder")
"""By file, since models are made for one; in order, which has no long file at its end."""

PARTS = {
    "MAGIC_MIRROR_COMFYUI": partial(environment.comfyui, environment.NEW_COMFYUI),
    "MAGIC_MIRROR_VALIDATORS": environment.validators,
    "MAGIC_MIRROR_COMFYUI_OLD": partial(environment.comfyui, environment.OLD_COMFYUI),
    "MAGIC_MIRROR_PAGE": partial(environment.page, environment.NEW_PAGE),
    "MAGIC_MIRROR_PAGE_OLD": partial(environment.page, environment.OLD_PAGE),
    "MAGIC_MIRROR_INSIGHTFACE_ROOT": environment.face_models,
    "MAGIC_MIRROR_PHOTOGRAPHS": environment.photographs,
    "MAGIC_MIRROR_BROWSER": partial(environment.browser, install="CI" in os.environ),
}
"""Where the tests find the real parts."""


def main() -> int:
    """Return pytest's exit code, or ruff's when only ruff found something."""
    newest, variables = _set_up()
    oldest = "--oldest" in sys.argv
    python = str(environment.oldest_environment()) if oldest else newest
    arguments = [argument for argument in sys.argv[1:] if argument != "--oldest"] or [
        *SIDE_BY_SIDE,
        *(OLDEST if oldest else ["tests"]),
    ]
    ruff = subprocess.run([newest, "-m", "ruff", "check", "--no-cache", "."], cwd=environment.ROOT, check=False)
    pytest = subprocess.run(
        [python, "-m", "pytest", *_pytest_options(), *arguments],
        cwd=environment.ROOT,
        env=os.environ | variables,
        check=False,
    )
    return pytest.returncode or ruff.returncode


def _set_up() -> tuple[str, dict[str, str]]:
    """The tests' Python and variables; what is missing is fetched at once, for most of it waits for others."""
    environment.comfyui(environment.NEW_COMFYUI)  # whose requirements are the environment's too
    with ThreadPoolExecutor() as pool:
        parts = {name: pool.submit(part) for name, part in PARTS.items()}
        python = environment.python_environment()
    found = {name: part.result() for name, part in parts.items()}
    return str(python), {
        "OMP_NUM_THREADS": "1",  # threads of tests side by side would wait for each other
        "PYTHONDONTWRITEBYTECODE": "",  # dozens of servers start: their sources are compiled once
        **{name: str(path) for name, path in found.items() if path is not None},
    }


def _pytest_options() -> tuple[str, ...]:
    """The checkout is a ComfyUI package: pytest must start below its ``__init__.py``, not at it."""
    tests = environment.ROOT / "tests"
    return ("-p", "no:cacheprovider", "--import-mode=importlib", f"--rootdir={tests}", f"--confcutdir={tests}")


if __name__ == "__main__":
    sys.exit(main())
