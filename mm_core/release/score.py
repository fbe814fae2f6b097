"""What an exported adapter can do: clips of the people left out of training, by the whole pipeline, measured."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ..checkpoints.adapter_file import read_header
from ..data.features import Features
from ..data.manifest import manifest_path, read_manifest, read_picture
from ..errors import SettingError
from ..evaluation.opens2v import FaceSim
from ..evaluation.recognisers import other_judges
from ..evaluation.report import write_report
from ..evaluation.run import evaluate
from ..faces.analysis import FaceAnalyzer
from ..faces.references import MIN_SAME_PERSON, analyse_references
from ..files import is_current, write_text
from ..pipelines.clip import ClipSettings
from ..pipelines.control import AdapterSettings
from ..pipelines.magic_mirror import MagicMirror
from ..pipelines.named import base_of
from ..training.config import ABLATIONS, TrainingConfig
from ..training.sources import data_of, face_analyzer, features_of, id_encoder_of, output_of
from ..video import write_picture, write_video

_log = logging.getLogger(__name__)

REPORT = "report.html"


def scores_of(config: TrainingConfig, adapter: Path) -> Path:
    """The folder of an exported adapter's scores, and of what they are of."""
    trained = read_header(adapter).trained
    return output_of(config) / "scores" / f"{trained.stage}-{trained.steps:08d}"


def people_of(config: TrainingConfig) -> Path:
    """The folder of the people left out of training: photos and prompts, a set that `evaluation benchmark` takes."""
    return output_of(config) / "set"


def clips_of(config: TrainingConfig, adapter: Path) -> dict[Path, int]:
    """The clip of each person left out, and the row of the features that it is made of. Raises SettingError."""
    features = Features.open(features_of(config, "video"))
    entries = {row: features.entries[row] for row in features.split(config.validation_people)[1].tolist()}
    people = {entry["person"] or entry["id"]: row for row, entry in entries.items()}
    if not people:
        raise SettingError("Nobody is left out of training, so that nobody can be scored: set validation_people.")
    folder = scores_of(config, adapter) / "videos"
    return {folder / f"person{number:03d}_prompt1.mp4": row for number, row in enumerate(people.values())}


def make_clips(config: TrainingConfig, adapter: Path, clips: Mapping[Path, int], rank: int, world_size: int) -> None:
    """A process's share of `clips_of`."""
    mine = dict(list(clips.items())[rank::world_size])
    wanted = {clip: row for clip, row in mine.items() if not is_current(clip, adapter)}
    if not wanted:
        return
    features, data = Features.open(features_of(config, "video")), manifest_path(data_of(config, "video"))
    captions = {sample.id: sample.caption for sample in read_manifest(data)}
    analyzer = face_analyzer(config)
    mirror = MagicMirror(base_of(config.base), adapter=adapter, id_encoder=id_encoder_of(config))
    for clip, row in wanted.items():
        entry = features.entries[row]
        photos = [read_picture(data.parent, features.references[number]) for number in entry["references"]]
        caption = captions[entry["id"]]
        _write_person(people_of(config) / clip.stem.partition("_")[0], caption, photos)
        _make(config, mirror, analyzer, caption, photos, clip)
    mirror.unload()


def write_scores(config: TrainingConfig, adapter: Path) -> Path:
    """Measure the clips; the page of the scores, which is kept if it is there."""
    folder = scores_of(config, adapter)
    if not is_current(folder / REPORT, adapter):
        analyzer = face_analyzer(config)
        evaluation = evaluate(
            analyzer, folder / "videos", people_of(config), threshold=MIN_SAME_PERSON,
            judges=other_judges(), facesim=FaceSim(analyzer),  # beside ArcFace, which it was trained with
        )  # fmt: skip
        trained = str(read_header(adapter).trained)
        settings = {"face_pack": config.face_pack, "threshold": MIN_SAME_PERSON, "adapter": trained}
        write_report(folder, evaluation, settings)
    return folder / REPORT


def _write_person(folder: Path, caption: str, photos: Sequence[np.ndarray]) -> None:
    for number, photo in enumerate(photos):
        write_picture(folder / f"{number}.png", photo)
    write_text(folder / "prompt1.txt", f"{caption}\n")


def _make(
    config: TrainingConfig, mirror: MagicMirror, analyzer: FaceAnalyzer, caption: str, photos: Sequence[np.ndarray],
    clip: Path,
) -> None:  # fmt: skip
    """A clip from a sample's own caption and photos."""
    identity = mirror.identity(analyse_references(analyzer, photos), config.face_pack)
    wanted = ClipSettings.of_model(
        mirror.base.limits, mirror.base.sampling, prompt=caption, width=config.width, height=config.height,
        num_frames=config.video.frames,
    )  # fmt: skip
    made = mirror.generate(wanted, identity, AdapterSettings(**ABLATIONS[config.ablation]))
    clip.parent.mkdir(parents=True, exist_ok=True)
    write_video(clip, made.frames, made.fps)
    _log.info("%s", clip)
