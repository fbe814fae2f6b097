"""The models that the loader offers by name, and the files behind the names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..mm_core.choices import TINY as TINY
from ..mm_core.errors import CheckpointError, SettingError
from ..mm_core.faces.packs import download_pack, onnx_files
from ..mm_core.folders import Folders, check_name, find_face_packs, find_folder, hub_folder, other_folders
from ..mm_core.pipelines.presets import HUB_ADDRESS, PRESETS
from . import runtime

if TYPE_CHECKING:
    from ..mm_core.faces.analysis import FaceAnalyzer
    from ..mm_core.pipelines.base import BaseModel
    from .types import Model

AUTO = "auto"
NONE = "none"
TINY_FACE_PACK = "buffalo_sc"
HUB = tuple(preset.repo for preset in PRESETS.values())

_KINDS = {
    "base_model": "diffusion_models",
    "adapter": runtime.ADAPTERS,
    "id_encoder": "photomaker",
    "text_encoder": "text_encoders",
    "vae": "vae",
}


def base_models() -> list[str]:
    """tiny, the published models, diffusers folders, single files."""
    others = other_folders(_diffusers_roots())
    return list(dict.fromkeys([TINY, *HUB, *others, *runtime.model_files("diffusion_models", ".safetensors")]))


def adapters() -> list[str]:
    return [AUTO, NONE, *runtime.model_files(runtime.ADAPTERS, ".safetensors")]


def id_encoders() -> list[str]:
    """The .safetensors first: Model Doctor makes one of the .bin."""
    return [AUTO, *runtime.model_files("photomaker", ".safetensors"), *runtime.model_files("photomaker", ".bin")]


def face_packs() -> list[str]:
    """insightface's usual packs, and those that are there."""
    return [AUTO, *find_face_packs(runtime.model_folders(runtime.FACE_MODELS))]


def find_face_pack(choice: str, base_model: str) -> str:
    """The pack meant: for "auto" the best of those that are there, or the one to get if there is none.

    An ID encoder reads the embeddings of the recogniser that it was trained with best: tiny's that of buffalo_sc,
    PhotoMaker-V2 that of buffalo_l.
    """
    if choice != AUTO:
        return choice
    roots = runtime.model_folders(runtime.FACE_MODELS)
    packs = find_face_packs(roots)
    if base_model == TINY:
        packs.sort(key=lambda pack: pack != TINY_FACE_PACK)
    there = (pack for pack in packs if any(onnx_files(root / "models" / pack) for root in roots))
    return next(there, packs[0])


def cautions(model: Model) -> list[str]:
    """What to say of every photo for a model."""
    if model.mirror.base.name != TINY:
        return []
    lines = ["tiny knows rendered people only: a photograph is outside of what it was trained on"]
    if model.face_pack != TINY_FACE_PACK:
        lines.append(f"tiny was trained with {TINY_FACE_PACK}; with {model.face_pack} expect less likeness")
    return lines


def face_root(pack: str) -> Path:
    """The insightface folder that holds a pack of the list; the usual one if none does. Raises CheckpointError."""
    if pack not in face_packs():
        raise CheckpointError(f"There is no face pack {str(pack)[:100]!r}; choose one of {', '.join(face_packs())}.")
    roots = runtime.model_folders(runtime.FACE_MODELS)
    return next((root for root in roots if (root / "models" / pack).is_dir()), roots[0])


def fetch_face_pack(pack: str) -> None:
    """Download a face pack if it is missing; only when the user allowed it."""
    download_pack(face_root(pack), pack)


def face_analyzer(pack: str) -> FaceAnalyzer:
    """By a pack of the list, where ComfyUI computes. Raises CheckpointError where it is missing or damaged."""
    from ..mm_core.faces.analysis import shared_analyzer

    root = face_root(pack)
    if not onnx_files(root / "models" / pack):
        raise CheckpointError(
            "The face models are missing: {folder} must hold the .onnx files of insightface's pack '{pack}' "
            "(detection and recognition). Download it from github.com/deepinsight/insightface (its models are licensed "
            'for non-commercial research only) and unzip it there, or switch on "allow_download" in Load MagicMirror',
            key="face_models_missing",
            folder=root / "models" / pack,
            pack=pack,
        )
    return shared_analyzer(root, pack, "cpu" if runtime.device().type == "cpu" else "auto")


def check_base(name: str) -> None:
    """Raises CheckpointError for a name that no base model has; a published one may have to be downloaded yet."""
    if name != TINY and name not in HUB and find_folder(_diffusers_roots(), name) is None:
        runtime.model_file("diffusion_models", name)


def open_base(name: str, *, text_encoder: str, vae: str, allow_download: bool) -> BaseModel:
    """The base model behind a name; nothing of it is loaded yet.

    Raises:
        CheckpointError: it is not on disk, or not all of it.
        SettingError: a single file without its text encoder or VAE.
    """
    from ..mm_core.pipelines.base import FolderBase, TinyBase
    from ..mm_core.pipelines.single_file import FileBase

    if name == TINY:
        return TinyBase()
    folder = _published(name, allow_download) if name in HUB else find_folder(_diffusers_roots(), name)
    if folder is not None:
        base = FolderBase(folder)
        base.check_complete()
        return base
    transformer = runtime.model_file("diffusion_models", name)
    for part, value in (("text_encoder", text_encoder), ("vae", vae)):
        if value == NONE:
            raise SettingError(f"{name} is a single file: choose its {part} too, under the advanced inputs.")
    return FileBase(
        transformer=transformer,
        text_encoder=runtime.model_file("text_encoders", text_encoder),
        vae=runtime.model_file("vae", vae),
        tokenizer_folder=runtime.t5_tokenizer(),
    )


def find_adapter(choice: str, base_model: str) -> Path | None:
    """The adapter's file; None for tiny's own, and for no adapter.

    Raises:
        CheckpointError: an adapter has to be chosen, or is missing.
    """
    if base_model == TINY and choice == NONE:
        raise SettingError('tiny brings its own adapter: choose "auto". For plain video, bypass the Apply node.')
    if choice == NONE or (base_model == TINY and choice == AUTO):
        return None
    if choice == AUTO:
        found = adapters()[2:]
        folder = runtime.model_folders(runtime.ADAPTERS)[0]
        raise CheckpointError(
            f"Choose the adapter for {base_model}: "
            + (f"one of {', '.join(found)}, or " if found else "")
            + f'put its .safetensors file into {folder}, or "none" for the base model alone.'
        )
    return runtime.model_file(runtime.ADAPTERS, choice)


def find_id_encoder(choice: str, base_model: str, adapter: str, allow_download: bool) -> Path | None:
    """PhotoMaker-V2's file; None where tiny brings its own, and without an adapter.

    Raises:
        CheckpointError: it is missing, and a download is not allowed.
    """
    if choice == AUTO and (base_model == TINY or adapter == NONE):
        return None
    from ..mm_core.checkpoints.photomaker import FILE_NAME, REPO, download_id_encoder

    stem = Path(FILE_NAME).stem
    files = id_encoders()[1:]
    if choice in files or choice not in (AUTO, FILE_NAME):
        return runtime.model_file("photomaker", choice)
    found = [name for name in files if Path(name).stem == stem]
    if found:
        return runtime.model_file("photomaker", found[0])
    folder = runtime.model_folders("photomaker")[0]
    if not allow_download:
        raise CheckpointError(
            "The ID encoder is missing: put {file} of nearly 2 GB from {address} into {folder}, or set the widget "
            '"allow_download" to true.',
            key="id_encoder_missing",
            file=FILE_NAME,
            folder=folder,
            address=f"{HUB_ADDRESS}/{REPO}/resolve/main/{FILE_NAME}",
        )
    return download_id_encoder(folder)


def files_behind(choices: Mapping[str, object]) -> list[Path]:
    """The files on disk that the loader's choices, input name to value, stand for. Raises CheckpointError for a name
    that leads out of its folder."""
    files = []
    for part, kind in _KINDS.items():
        name = choices.get(part)
        if name is not None:
            check_name(name)
            files += [Path(path) / name for path in runtime.model_folders(kind)]
    base = choices.get("base_model")
    if base is not None:
        folder = hub_folder(_diffusers_roots(), base) if base in HUB else find_folder(_diffusers_roots(), base)
        if folder is not None:
            files += [*folder.glob("*/*.json"), *folder.glob("*/*.safetensors")]
    return [file for file in files if file.is_file()]


def folders() -> Folders:
    """Where all kinds of models are looked for, a kind's own folder before the older names that ComfyUI has for it."""

    def of(kind: str) -> tuple[Path, ...]:
        return tuple(sorted(runtime.model_folders(kind), key=lambda folder: folder.name != kind))

    return Folders(
        base_models=tuple(_diffusers_roots()),
        diffusion_models=of("diffusion_models"),
        text_encoders=of("text_encoders"),
        vae=of("vae"),
        photomaker=of("photomaker"),
        adapters=of(runtime.ADAPTERS),
        faces=of(runtime.FACE_MODELS),
    )


def _published(repo: str, allow_download: bool) -> Path:
    """The folder of a model of the hub, fetched where that is allowed."""
    from ..mm_core.pipelines.base import FolderBase, download_folder

    folder = hub_folder(_diffusers_roots(), repo)
    missing = FolderBase(folder).missing_files()
    if not missing:
        return folder
    if not allow_download:
        where = dict(repo=repo, folder=folder, address=f"{HUB_ADDRESS}/{repo}")
        if not folder.is_dir():
            raise CheckpointError(
                "{repo} is not on this machine: there is no {folder}. Download all of {address} (about 20 GB) into "
                'that folder, or set "allow_download" to true.',
                key="base_model_missing",
                **where,
            )
        raise CheckpointError(
            "{repo} is not on this machine: {folder} lacks {missing}. Download all of {address} (about 20 GB) into "
            'that folder, or set "allow_download" to true; what is there already is kept.',
            key="base_model_incomplete",
            missing=", ".join(missing),
            **where,
        )
    return download_folder(repo, folder)


def _diffusers_roots() -> list[Path]:
    return runtime.model_folders(runtime.BASE_MODELS) + runtime.model_folders("diffusers")
