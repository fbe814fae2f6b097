"""Set up what the tests need, then run ruff and pytest; arguments are handed to pytest."""

from __future__ import annotations

import os
import subprocess
import sys

import environment


def main() -> int:
    """Return pytest's exit code, or ruff's when only ruff found something."""
    python = str(environment.python_environment())
    variables = {**os.environ, **_variables()}
    ruff = subprocess.run([python, "-m", "ruff", "check", "--no-cache", "."], cwd=environment.ROOT, check=False)
    pytest = subprocess.run(
        [python, "-m", "pytest", *_pytest_options(), *(sys.argv[1:] or ["tests"])],
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
