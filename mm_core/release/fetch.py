"""What a config names and this machine lacks: fetched with the user's consent, resumed, held against known hashes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ..checkpoints.photomaker import FILE_NAME, REPO, download_id_encoder
from ..checkpoints.published import PUBLISHED_SHA256, sha256_of
from ..errors import MagicMirrorError
from ..faces.packs import download_pack, onnx_files
from ..files import DOWNLOADS
from ..pipelines.base import FolderBase, download_folder
from ..pipelines.named import folder_of
from ..pipelines.presets import HUB_ADDRESS, published
from ..training.config import TrainingConfig
from ..training.sources import face_models_of, id_encoder_of

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Part:
    """One thing to fetch."""

    name: str
    path: Path
    licence: str
    missing: bool
    download: Callable[[], object]
    hashed: dict[Path, str]
    """The SHA-256 of its files, as far as published."""


def parts(config: TrainingConfig) -> Iterator[Part]:
    """What a config names by a public name: base, ID encoder, face pack. What it names by a path is not fetched."""
    if (preset := published(config.base)) is not None:
        folder = folder_of(config.base)
        yield Part(
            name=preset.repo,
            path=folder,
            licence=f"its own, {HUB_ADDRESS}/{preset.repo}",
            missing=bool(FolderBase(folder).missing_files()),
            download=partial(download_folder, preset.repo, folder),
            hashed=_published(folder, preset.repo),
        )
        if config.id_encoder is None:
            path = id_encoder_of(config)
            yield Part(
                name=f"{REPO}, {FILE_NAME}",
                path=path,
                licence=f"its own, {HUB_ADDRESS}/{REPO}",
                missing=not path.is_file(),
                download=partial(download_id_encoder, DOWNLOADS),
                hashed={DOWNLOADS / FILE_NAME: PUBLISHED_SHA256[FILE_NAME]},
            )
    root, pack = face_models_of(config), config.face_pack
    folder = root / "models" / pack
    yield Part(
        name=f"insightface's {pack}",
        path=folder,
        licence="for non-commercial research only",
        missing=not onnx_files(folder),
        download=partial(download_pack, root, pack),
        hashed=_published(folder, pack),
    )


def _published(folder: Path, owner: str) -> dict[Path, str]:
    """Of the files of a repository, or a face pack."""
    whose = f"{owner}/"
    return {folder / key.removeprefix(whose): sha for key, sha in PUBLISHED_SHA256.items() if key.startswith(whose)}


def fetch(config: TrainingConfig, accepted: bool) -> list[Path]:
    """Fetch what is missing, and hold all of it against the published hashes. Returns where everything is.

    accepted: the user accepts the licences. Raises MagicMirrorError without, naming what would be fetched, and for a
    file that is not the published one.
    """
    wanted = list(parts(config))
    missing = [part for part in wanted if part.missing]
    if missing and not accepted:
        lines = [f"{part.name} into {part.path} (licence: {part.licence})" for part in missing]
        raise MagicMirrorError(
            "These would be fetched:\n  " + "\n  ".join(lines) + "\nAdd --accept-licences if you accept what they say."
        )
    for part in missing:
        _log.info("fetching %s into %s", part.name, part.path)
        part.download()
    for path, wanted_sha in ((path, sha) for part in wanted for path, sha in part.hashed.items() if path.is_file()):
        found = sha256_of(path)
        if found != wanted_sha:
            raise MagicMirrorError(
                f"{path} has the SHA-256 {found}, not the published {wanted_sha}. Remove it and run this again."
            )
    return [part.path for part in wanted]
