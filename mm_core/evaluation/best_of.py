"""Which of several clips keeps a person best, and whether that is good enough."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np

from ..errors import MagicMirrorError, SettingError
from ..faces.analysis import Face, FaceAnalyzer
from ..faces.tracking import find_faces, follow
from .metrics import mean_found, similarities
from .scores import MIN_FACE_RATE

LOWEST = -1.0  # the score of a clip without any face


@dataclass(frozen=True, kw_only=True, eq=False)
class BestOf:
    """N clips, compared.

    similarity: (N, F) cosine of each frame's face to the person, -1 to 1, NaN without a face.
    scores: (N,) their means over found faces, LOWEST without any.
    best: index of the clip with the highest score; clips that show a face in MIN_FACE_RATE of their frames come first.
    passed: the best clip shows a face that often, and its score reaches the threshold.
    """

    similarity: np.ndarray
    scores: np.ndarray
    best: int
    threshold: float
    passed: bool

    @property
    def score(self) -> float:
        """Of the best clip."""
        return float(self.scores[self.best])

    @property
    def summary(self) -> str:
        """A sentence for the user, with the score, the threshold and the frames without a face."""
        frames = self.similarity.shape[1]
        faces = int((~np.isnan(self.similarity[self.best])).sum())
        which = f"clip {self.best} of {len(self.scores)}: " if len(self.scores) > 1 else ""
        verdict = "passed" if self.passed else "NOT passed"
        likeness = f"likeness {self.score:.3f}, threshold {self.threshold:.3f}"
        return f"{which}{likeness}, face in {faces} of {frames} frames: {verdict}"

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, rounded; None for a frame without a face."""
        rows = [[None if np.isnan(value) else round(float(value), 4) for value in row] for row in self.similarity]
        return {
            "best_index": self.best,
            "score": round(self.score, 4),
            "threshold": self.threshold,
            "passed": self.passed,
            "clips": [
                {
                    "score": round(float(score), 4),
                    "frames": len(row),
                    "frames_without_face": row.count(None),
                    "similarity": row,
                }
                for score, row in zip(self.scores, rows)
            ],
        }


def split_clips(frames: np.ndarray, clips: int) -> np.ndarray:
    """(N * F, H, W, 3) -> (N, F, H, W, 3). Raises SettingError if they cannot be split evenly."""
    if clips < 1 or not len(frames) or len(frames) % clips:
        raise SettingError(
            f"{len(frames)} frames are not {clips} clips of one length: set clips to the number of clips in the batch"
        )
    return frames.reshape(clips, -1, *frames.shape[1:])


def best_of(
    analyzer: FaceAnalyzer,
    clips: Sequence[np.ndarray],
    references: np.ndarray,
    *,
    threshold: float,
    centre: np.ndarray | None = None,
    on_frame: Callable[[int], None] = lambda done: None,
) -> BestOf:
    """Compare clips of one length with a person.

    clips: one or more of (F, H, W, 3) uint8 RGB. references: (R, C) embeddings of the photos, not normalised.
    threshold: a cosine, -1 to 1. centre: as in `metrics.similarities`. on_frame: is told how many frames are done.

    Raises SettingError for a threshold out of range.
    """
    if not -1 <= threshold <= 1:
        raise SettingError(f"threshold is {threshold}: give a cosine from -1 to 1")
    done = count(1)
    followed = [_follow(analyzer, clip, lambda: on_frame(next(done))) for clip in clips]
    similarity = np.stack([_similarity(embeddings, references, centre) for embeddings in followed])
    found = ~np.isnan(similarity)
    scores = np.array([mean_found(row) if any(seen) else LOWEST for row, seen in zip(similarity, found)])
    shows = found.mean(axis=1) >= MIN_FACE_RATE
    best = int(np.lexsort((np.arange(len(scores))[::-1], scores, shows))[-1])  # of equal ones the first
    passed = bool(shows[best] and scores[best] >= threshold)
    return BestOf(similarity=similarity, scores=scores, best=best, threshold=threshold, passed=passed)


def centre_of(analyzer: FaceAnalyzer, photos: Sequence[np.ndarray]) -> np.ndarray:
    """(C,) mean of the normalised embeddings of all faces in pictures of many people, (H, W, 3) uint8 RGB each.

    Raises MagicMirrorError if none shows a face.
    """
    faces = [face.normed_embedding for photo in photos for face in find_faces(analyzer, photo)]
    if not faces:
        raise MagicMirrorError(
            f"none of the {len(photos)} pictures to centre on shows a face: give one each of many people, or none"
        )
    return np.mean(faces, axis=0)


def _follow(analyzer: FaceAnalyzer, clip: np.ndarray, on_frame: Callable[[], None]) -> list[np.ndarray | None]:
    """The person's embedding in each frame, None without a face."""
    embeddings: list[np.ndarray | None] = []
    last: Face | None = None
    for frame in clip:
        face = follow(find_faces(analyzer, frame), last)
        last = face or last
        embeddings.append(face and face.embedding)
        on_frame()
    return embeddings


def _similarity(embeddings: list[np.ndarray | None], references: np.ndarray, centre: np.ndarray | None) -> np.ndarray:
    """(F,), NaN without a face."""
    nothing = np.full(references.shape[1], np.nan)
    rows = np.stack([nothing if embedding is None else embedding for embedding in embeddings])
    return similarities(rows, references, centre)
