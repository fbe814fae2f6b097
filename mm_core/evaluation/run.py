"""A folder of videos, measured one after the other; what cannot be measured is kept with the reason."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..errors import MagicMirrorError
from ..faces.analysis import FaceAnalyzer
from ..video_reader import read_frames
from .clip import ClipAnalysis, analyse_clip
from .flow import FlowFunction
from .inception import Inception
from .opens2v import FaceSim
from .people import Person, find_references, find_videos, identity_of, load_person
from .recognisers import Judge
from .scores import ClipScores, Summary, frame_similarities, score_clip, summarise
from .text import TextAlignment, find_prompts, sampled


@dataclass(frozen=True, kw_only=True, eq=False)
class ClipResult:
    """One measured video. similarity: (F,) cosine to the person's mean, NaN without a face."""

    path: Path
    name: str
    person: Person
    analysis: ClipAnalysis
    similarity: np.ndarray
    scores: ClipScores


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """A video that could not be measured, and why."""

    video: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A folder's results, in the order of the videos' names. inception_score: NaN if it was not measured."""

    clips: list[ClipResult]
    skipped: list[Skipped]
    inception_score: float = math.nan

    @property
    def summary(self) -> Summary:
        """Of at least one clip."""
        return summarise([clip.scores for clip in self.clips], [clip.person.name for clip in self.clips])


def evaluate(
    analyzer: FaceAnalyzer,
    videos: Path,
    references: Path,
    *,
    threshold: float,
    centre: np.ndarray | None = None,
    alignment: TextAlignment | None = None,
    flow_between: FlowFunction | None = None,
    judges: Sequence[Judge] = (),
    facesim: FaceSim | None = None,
    inception: Inception | None = None,
    on_video: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> Evaluation:
    """Measure every video of a folder.

    threshold: cosine from which a clip counts as of the person. centre: as in `metrics.similarities`.
    alignment: measures the videos that have a prompt, see text. flow_between: optical flow, DIS by default.
    judges: other recognisers. facesim: compares with each person's first photo. inception: sees alignment's frames.
    on_video: called before each video with its name, how many are done, and how many there are.

    Raises MagicMirrorError if a folder is missing or empty; a video, or an identity's photos, that cannot be used only
    leaves its videos out.
    """
    people = _People(analyzer, find_references(references), judges)
    paths = find_videos(videos)
    prompts = find_prompts(videos, paths, references) if alignment else {}
    clips: list[ClipResult] = []
    skipped: list[Skipped] = []
    for done, path in enumerate(paths):
        name = path.relative_to(videos).as_posix()
        on_video(name, done, len(paths))
        try:
            person = people[identity_of(path, videos, list(people.photos))]
            analysis = analyse_clip(analyzer, read_frames(path), flow_between, judges)
        except MagicMirrorError as error:
            skipped.append(Skipped(video=name, reason=str(error)))
            continue
        similarity = frame_similarities(analysis, person, centre)
        scores = score_clip(analysis, person, similarity, threshold)
        if path in prompts or inception is not None:
            frames = sampled(read_frames(path), len(analysis))
            if path in prompts:
                scores = replace(scores, text_alignment=alignment(frames, prompts[path]))
            if inception is not None:
                inception.add(frames)
        if facesim is not None:
            arc, cur = facesim(person.photos[0], read_frames(path), len(analysis))
            scores = replace(scores, facesim_arc=arc, facesim_cur=cur)
        clips.append(
            ClipResult(path=path, name=name, person=person, analysis=analysis, similarity=similarity, scores=scores)
        )
    return Evaluation(clips=clips, skipped=skipped, inception_score=inception.score if inception else math.nan)


class _People:
    """Identities by name; photos are read when first asked for, and their error is raised each time."""

    def __init__(self, analyzer: FaceAnalyzer, photos: dict[str, list[Path]], judges: Sequence[Judge]) -> None:
        self.photos = photos
        self._analyzer, self._judges = analyzer, judges
        self._known: dict[str, Person | MagicMirrorError] = {}

    def __getitem__(self, name: str) -> Person:
        if name not in self._known:
            try:
                self._known[name] = load_person(self._analyzer, name, self.photos[name], self._judges)
            except MagicMirrorError as error:
                self._known[name] = error
        person = self._known[name]
        if isinstance(person, MagicMirrorError):
            raise person
        return person
