"""Model Doctor: which model files are here, which are missing or damaged, and where each belongs.

Only `convert` writes anything. What opens models is imported in functions: nodes ask this where packages are missing.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

from .checkpoints.published import PUBLISHED_SHA256, sha256_of
from .choices import TINY
from .errors import CheckpointError
from .faces.packs import onnx_files
from .folders import Folders, find_face_packs, find_folder, hub_folder, other_folders, walk
from .json_file import read_object
from .pipelines.presets import HUB_ADDRESS, PRESETS

FOUND, MISSING, PROBLEM = "found", "missing", "problem"

_COGVIDEOX_LICENCE = "the CogVideoX licence: commercial use needs registration"
_BASE_LICENCES = {"THUDM/CogVideoX-2b": "Apache-2.0"}
_FACE_LICENCE = "InsightFace: for non-commercial research only"
_FACE_LINK = "https://github.com/deepinsight/insightface/tree/master/model_zoo"
_THEIR_OWN = "its author's, see where it came from"
_PARTS = {
    "transformer": ("transformer file", "cogvideo"),
    "text_encoder": ("text encoder file", "t5xxl"),
    "vae": ("VAE file", "cogvideo"),
}
"""What a part is called, and what the name of a file that is meant to be one contains."""
_MISSING_PARTS = {
    "text_encoder": ("t5xxl_fp16.safetensors", f"{HUB_ADDRESS}/comfyanonymous/flux_text_encoders", "Apache-2.0"),
    "vae": ("cogvideox_vae.safetensors", f"{HUB_ADDRESS}/THUDM/CogVideoX-5b/tree/main/vae", _COGVIDEOX_LICENCE),
}


@dataclass(frozen=True, kw_only=True)
class ModelFile:
    """One file of weights."""

    path: Path
    size: int
    """Bytes."""
    published: str | None = None
    """The SHA-256 that its publisher names, where that is known here."""
    sha256: str | None = None
    """Of the file itself; see `add_hashes`."""

    @property
    def differs(self) -> bool:
        return None not in (self.sha256, self.published) and self.sha256 != self.published


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One model: where it is, or that it is missing and where it belongs."""

    kind: str
    name: str
    path: Path
    files: tuple[ModelFile, ...] = ()
    """Its weights; empty when it is missing."""
    problem: str = ""
    """Why it cannot be used, and the remedy."""
    detail: str = ""
    link: str = ""
    licence: str = _THEIR_OWN

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def state(self) -> str:
        if self.problem or any(file.differs for file in self.files):
            return PROBLEM
        return FOUND if self.files else MISSING


def find_models(folders: Folders) -> list[Finding]:
    """Everything that this product can use. Configs and headers are read, no weights."""
    return [
        _tiny(),
        *_base_models(folders.base_models),
        *_single_files("transformer", folders.diffusion_models),
        *_single_files("text_encoder", folders.text_encoders),
        *_single_files("vae", folders.vae),
        *_adapters(folders.adapters),
        *_id_encoders(folders.photomaker),
        *_face_packs(folders.faces),
    ]


def add_hashes(findings: Sequence[Finding], on_bytes: Callable[[int], None] = lambda done: None) -> list[Finding]:
    """The findings with the SHA-256 of every file, which reads all of them: minutes for a full set.

    on_bytes: told, every few MB, how many bytes of all are read; the sum of the findings' sizes in the end.
    """
    done = 0

    def hashed(file: ModelFile) -> ModelFile:
        def read(count: int) -> None:
            nonlocal done
            done += count
            on_bytes(done)

        return replace(file, sha256=sha256_of(file.path, read))

    return [replace(finding, files=tuple(hashed(file) for file in finding.files)) for finding in findings]


def convert(folders: Folders) -> str:
    """Write `photomaker-v2.safetensors` beside each `photomaker-v2.bin`, a pickle, that has none; says what was done.

    Raises:
        CheckpointError: a damaged file, or a copy that cannot be written.
    """
    from .checkpoints.photomaker import convert_id_encoder

    lines = []
    for path in _id_encoder_files(folders.photomaker):
        if path.suffix == ".safetensors":
            lines.append(f"KEPT: {path}")
        elif not path.with_suffix(".safetensors").exists():
            copy = convert_id_encoder(path)
            size = _readable(copy.stat().st_size)
            lines.append(f"CONVERTED: {path} into {copy.name}, {size}, compared tensor by tensor. The .bin stays.")
    return "\n".join(lines or ["NOTHING TO CONVERT: the ID encoder is missing."])


def verdict(findings: Sequence[Finding], model: str = "") -> str:
    """What can run and what is in the way, a line for each base model, or for one of that name.

    A problem of installed packages that hurts other packs follows.
    """
    kinds = {finding.kind for finding in findings if finding.state == FOUND}
    names = {finding.name for finding in findings if finding.state == FOUND}
    faces = "face pack" in kinds
    lines = []
    if model in ("", TINY):
        ready = "tiny can run." if TINY in names else "tiny is damaged: install the node pack again."
        lines.append(ready if faces else f"{ready} For photos it lacks a face pack; the example person needs none.")
    for preset in PRESETS.values():
        if model not in ("", preset.repo):
            continue
        needed = {"the base model": preset.repo in names, "an adapter (none is published)": "adapter" in kinds}
        needed |= {"the ID encoder": "ID encoder" in kinds, "a face pack": faces}
        lacks = [part for part, there in needed.items() if not there]
        lines.append(f"{preset.repo} lacks {', '.join(lacks)}." if lacks else f"{preset.repo} can run.")
    return "\n".join([*lines, *_two_opencvs()])


def _two_opencvs() -> list[str]:
    """insightface brings opencv-python, which writes the folder that opencv-contrib-python has: the last one wins."""
    installed = {name.lower() for name in metadata.packages_distributions().get("cv2", [])}
    if not {"opencv-python", "opencv-contrib-python"} <= installed:
        return []
    return [
        "opencv-python and opencv-contrib-python are both installed, and only one of them is what is imported. If "
        "another pack misses a part of cv2: python -m pip install --force-reinstall --no-deps opencv-contrib-python"
    ]


def report(findings: Sequence[Finding]) -> str:
    """The findings as text, a few lines each, and a line that counts them."""
    lines = []
    worst_first = (PROBLEM, MISSING, FOUND)
    for finding in sorted(findings, key=lambda finding: worst_first.index(finding.state)):
        size = f", {_readable(finding.size)}" if finding.files else ""
        lines.append(f"{finding.state.upper()}: {finding.kind} {finding.name}{size}")
        lines += [f"    {line}" for line in _details(finding)]
    states = [finding.state for finding in findings]
    lines.append(
        f"{states.count(FOUND)} found, {states.count(MISSING)} missing, {states.count(PROBLEM)} with a problem. "
        "Of what is missing you need only what you want to use."
    )
    return "\n".join(lines)


def _tiny() -> Finding:
    from .pipelines.base import TinyBase

    base = TinyBase()
    own = (base.adapter, base.id_encoder)
    lacks = [*base.missing_files(), *(path.name for path in own if not path.is_file())]
    files = [*sorted(base.folder.glob("*/*.safetensors")), *(path for path in own if path.is_file())]
    return Finding(
        kind="built-in model",
        name=TINY,
        path=base.folder,
        files=_describe(files),
        problem=f"It lacks {', '.join(lacks)}. Install the node pack again." if lacks else _damaged(files),
        detail="comes with this pack, with its own adapter and ID encoder",
        licence="Apache-2.0; its ID branch and VAE learnt from a non-commercial recogniser",
    )


def _base_models(roots: Sequence[Path]) -> Iterator[Finding]:
    if not roots:
        return
    for preset in PRESETS.values():
        yield _base_model(
            preset.repo,
            hub_folder(roots, preset.repo),
            link=f"{HUB_ADDRESS}/{preset.repo}",
            licence=_BASE_LICENCES.get(preset.repo, _COGVIDEOX_LICENCE),
        )
    for name in dict.fromkeys(other_folders(roots)):
        folder = find_folder(roots, name)
        if not _is_another_model(folder):
            yield _base_model(name, folder, link="", licence=_THEIR_OWN)


def _is_another_model(folder: Path) -> bool:
    """Whether a diffusers folder is for other software's sake here; a damaged config is no sign of that."""
    try:
        name = read_object(folder / "transformer" / "config.json").get("_class_name", "CogVideoX")
    except CheckpointError:
        return False
    return isinstance(name, str) and not name.startswith("CogVideoX")


def _base_model(name: str, folder: Path, *, link: str, licence: str) -> Finding:
    from .pipelines.base import FolderBase

    finding = Finding(kind="base model", name=name, path=folder, link=link, licence=licence)
    if not folder.is_dir():
        return finding
    files = sorted(path for path in folder.glob("*/*.safetensors") if path.is_file())
    base = FolderBase(folder)
    try:
        lacks = base.missing_files()
        problem = f"It lacks {', '.join(lacks)}. Download it again; what is there is kept." if lacks else ""
        if not lacks:
            base.check_complete()  # raises for another kind of model
    except CheckpointError as error:
        problem = str(error)
    return replace(finding, files=_describe(files, folder, name), problem=problem or _damaged(files))


def _single_files(part: str, roots: Sequence[Path]) -> Iterator[Finding]:
    """Of a folder that holds all kinds of models, those that are this part of a CogVideoX model."""
    from .pipelines.single_file import recognise

    if not roots:
        return
    kind, hint = _PARTS[part]
    found = False
    for path in walk(roots, ".safetensors"):
        model = recognise(path, part)
        if model is None and hint not in path.name.lower():
            continue
        found = True
        problem = ""
        if model is None:
            problem = _damaged([path]) or (
                f"Its tensors are not those of a published {kind} under diffusers' names. Use a diffusers folder, or a "
                "file converted from one."
            )
        licence = _THEIR_OWN
        if model is not None:
            licence = "Apache-2.0" if part == "text_encoder" else _BASE_LICENCES.get(model, _COGVIDEOX_LICENCE)
        yield Finding(
            kind=kind, name=path.name, path=path, files=_describe([path]), problem=problem, detail=model or "",
            licence=licence,
        )  # fmt: skip
    if not found and part in _MISSING_PARTS:
        name, link, licence = _MISSING_PARTS[part]
        detail = "only for a base model that is a single file"
        yield Finding(kind=kind, name=name, path=roots[0] / name, detail=detail, link=link, licence=licence)


def _adapters(roots: Sequence[Path]) -> Iterator[Finding]:
    from .checkpoints.adapter_file import read_header

    files = list(walk(roots, ".safetensors"))
    for path in files:
        problem = detail = ""
        try:
            header = read_header(path)
            detail = f"for {header.base_model}; {header.trained}"
        except CheckpointError as error:
            problem = str(error)
        yield Finding(
            kind="adapter", name=path.name, path=path, files=_describe([path]), problem=problem, detail=detail
        )
    if roots and not files:
        detail = "none is published yet; tiny brings its own"
        yield Finding(kind="adapter", name="*.safetensors", path=roots[0], detail=detail)


def _id_encoders(roots: Sequence[Path]) -> Iterator[Finding]:
    from .checkpoints.photomaker import FILE_NAME, REPO

    about = dict(kind="ID encoder", link=f"{HUB_ADDRESS}/{REPO}", licence="Apache-2.0, as its page says")
    files = _id_encoder_files(roots)
    for path in files:
        # torch.save writes a zip file, whose directory stands at its end.
        whole = path.suffix != ".bin" or zipfile.is_zipfile(path)
        problem = _damaged([path]) if whole else f"{path.name} is cut short, or no file of weights. Download it again."
        detail = ""
        if path.suffix == ".bin":
            detail = "a pickle; convert writes a .safetensors copy, once"
            if path.with_suffix(".safetensors") in files:
                detail = "its .safetensors copy is used instead"
        yield Finding(name=path.name, path=path, files=_describe([path]), problem=problem, detail=detail, **about)
    if roots and not files:
        yield Finding(name=FILE_NAME, path=roots[0] / FILE_NAME, **about)


def _id_encoder_files(roots: Sequence[Path]) -> list[Path]:
    from .checkpoints.photomaker import FILE_NAME

    return [path for path in walk(roots, ".bin", ".safetensors") if path.stem == Path(FILE_NAME).stem]


def _face_packs(roots: Sequence[Path]) -> Iterator[Finding]:
    for name in find_face_packs(roots) if roots else []:
        folders = [root / "models" / name for root in roots]
        folder = next((folder for folder in folders if onnx_files(folder)), folders[0])
        files = onnx_files(folder)
        problem = ""
        if len(files) == 1:
            problem = f"It holds {files[0].name} only; detection and recognition are two files. Unzip the pack again."
        yield Finding(
            kind="face pack", name=name, path=folder, files=_describe(files, folder, name), problem=problem,
            link=_FACE_LINK, licence=_FACE_LICENCE,
        )  # fmt: skip


def _damaged(files: Sequence[Path]) -> str:
    """What to say of `.safetensors` files that are not whole; empty if all are."""
    from .checkpoints.safetensors_file import is_whole

    broken = [path for path in files if path.suffix == ".safetensors" and not is_whole(path)]
    names = ", ".join(f"{path.name} ({path.stat().st_size:,} bytes)" for path in broken)
    return f"Damaged or cut short: {names}. Download or copy it again." if broken else ""


def _describe(files: Sequence[Path], folder: Path | None = None, repo: str = "") -> tuple[ModelFile, ...]:
    """folder, repo: of a published model, whose files are known by their place in it."""
    keys = [path.name if folder is None else f"{repo}/{path.relative_to(folder).as_posix()}" for path in files]
    return tuple(
        ModelFile(path=path, size=path.stat().st_size, published=PUBLISHED_SHA256.get(key))
        for path, key in zip(files, keys)
    )


def _details(finding: Finding) -> Iterator[str]:
    yield f"{'at' if finding.files else 'belongs into'} {finding.path}"
    if finding.problem:
        yield finding.problem
    if finding.detail:
        yield finding.detail
    if finding.link:
        yield f"from {finding.link}"
    yield f"licence: {finding.licence}"
    for file in finding.files:
        if file.sha256 is not None:
            known = "no published hash is known here" if file.published is None else "as published"
            verdict = f"NOT the published file, {file.published}" if file.differs else known
            yield f"{file.path.name}: SHA-256 {file.sha256} ({verdict})"


def _readable(size: int) -> str:
    """Bytes as a person reads them: 21.53 GB."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{size / unit:.2f} {name}"
    return f"{size} bytes"
