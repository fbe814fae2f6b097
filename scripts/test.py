"""Set up what the tests need, then run ruff and pytest; arguments are handed to pytest.

With `--oldest`, those without ComfyUI that concern them run with the oldest packages that requirements.txt allows.
"""

from __future__ import annotations

import os
import subprocess
import sys

import environment

OLDEST = (
    *("tests/pipelines", "tests/models", "tests/checkpoints", "tests/faces"),
    *("tests/training/test_loop.py", "tests/training/test_adapter_training.py"),
    *("tests/test_memory.py", "tests/test_import.py", "tests/test_video.py", "tests/test_cli.py"),
)


def main() -> int:
    """Return pytest's exit code, or ruff's when only ruff found something."""
    newest = str(environment.python_environment())
    oldest = "--oldest" in sys.argv
    python = str(environment.oldest_environment()) if oldest else newest
    arguments = [argument for argument in sys.argv[1:] if argument != "--oldest"] or (OLDEST if oldest else ["tests"])
    variables = {**os.environ, **_variables()}
    ruff = subprocess.run([newest, "-m", "ruff", "check", "--no-cache", "."], cwd=environment.ROOT, check=False)
    pytest = subprocess.run(
        [python, "-m", "pytest", *_pytest_options(), *arguments],
        cwd=environment.ROOT,
        env=variables,
        check=False,
    )
    return pytest.returncode or ruff.returncode


def _variables() -> dict[str, str]:
    """Where the tests find the real parts."""
    found = environment.browser(install="CI" in os.environ)
    return {
        "MAGIC_MIRROR_COMFYUI": str(environment.comfyui(environment.NEW_COMFYUI)),
        "MAGIC_MIRROR_VALIDATORS": str(environment.validators()),
        "MAGIC_MIRROR_COMFYUI_OLD": str(environment.comfyui(environment.OLD_COMFYUI)),
        "MAGIC_MIRROR_PAGE": str(environment.page(environment.NEW_PAGE)),
        "MAGIC_MIRROR_PAGE_OLD": str(environment.page(environment.OLD_PAGE)),
        "MAGIC_MIRROR_INSIGHTFACE_ROOT": str(environment.face_models()),
        "MAGIC_MIRROR_PHOTOGRAPHS": str(environment.photographs()),
        **({"MAGIC_MIRROR_BROWSER": str(found)} if found else {}),
    }


def _pytest_options() -> tuple[str, ...]:
    """The checkout is a ComfyUI package: pytest must start below its ``__init__.py``, not at it."""
    tests = environment.ROOT / "tests"
    return ("-p", "no:cacheprovider", "--import-mode=importlib", f"--rootdir={tests}", f"--confcutdir={tests}")


if __name__ == "__main__":
    sys.exit(main())
