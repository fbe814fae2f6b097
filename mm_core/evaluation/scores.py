"""The numbers of one clip, and of many clips together."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np

from . import metrics
from .clip import ClipAnalysis
from .people import Person

MIN_FACE_RATE = 0.5  # of a clip's frames: with fewer faces the clip shows no person
UNSQUARED = (1, 1)


@dataclass(frozen=True, kw_only=True)
class ClipScores:
    """What one clip scored; docs/evaluation.md defines each. NaN: it could not be measured.

    frames: in the clip. faces: of them, those with a face; the means over faces are over so many.
    id_similarity: mean over faces of the cosine to the mean of the references, -1 to 1.
    id_decay: its loss from the first to the last quarter, -2 to 2.
    fm_ref: mean over faces of the shape's distance to the reference's, both pictures resized to one square, 0 to 2.
    fm_ref_pose: the same with the pictures as they are: 0 for one pose in pictures of any shape.
    fm_inter_px: the face's largest step between consecutive frames, in pixels.
    fm_inter: the same as a part of the frames' shorter side.
    smoothness: mean flow consistency, 0 to 1. motion_px: mean flow of the fastest twentieth, in pixels.
    face_found: MIN_FACE_RATE of the frames have a face. dynamic: VBench's rule.
    identity_accepted: a face was found and id_similarity reaches the threshold.
    text_alignment: CLIP's cosine of frames and prompt, -1 to 1; see text.
    """

    frames: int
    faces: int
    face_rate: float
    id_similarity: float
    id_decay: float
    fm_ref: float
    fm_ref_pose: float
    fm_inter: float
    fm_inter_px: float
    smoothness: float
    motion_px: float
    face_found: bool
    identity_accepted: bool
    dynamic: bool
    text_alignment: float = math.nan


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Means over clips, each over the clips that it could be measured on, and rates of all clips, 0 to 1.

    measured: for each mean, on how many clips. face_rate is over all frames of all clips.
    """

    clips: int
    frames: int
    face_rate: float
    means: dict[str, float]
    measured: dict[str, int]
    success_face: float
    success_identity: float
    success_motion: float


MEANS = (
    *("id_similarity", "id_decay", "fm_ref", "fm_ref_pose", "fm_inter", "fm_inter_px", "smoothness", "motion_px"),
    "text_alignment",
)


def frame_similarities(clip: ClipAnalysis, person: Person, centre: np.ndarray | None = None) -> np.ndarray:
    """(F,) cosine to the mean of the person's references, NaN without a face; `centre` as in metrics."""
    if not clip.found.any():
        return np.full(len(clip), np.nan)
    return metrics.similarities(clip.embeddings, person.embeddings, centre)


def score_clip(clip: ClipAnalysis, person: Person, similarity: np.ndarray, threshold: float) -> ClipScores:
    """The clip's numbers. similarity: (F,) of `frame_similarities`. threshold: cosine that counts as the person."""
    to_reference = metrics.motion_to_reference(clip.landmarks, clip.size, person.landmarks, person.picture_size)
    pose = metrics.motion_to_reference(clip.landmarks, UNSQUARED, person.landmarks, UNSQUARED)
    step = metrics.largest_found(metrics.motion_between(clip.landmarks))
    mean_similarity = metrics.mean_found(similarity)
    face_rate = float(clip.found.mean())
    return ClipScores(
        frames=len(clip),
        faces=int(clip.found.sum()),
        face_rate=face_rate,
        id_similarity=mean_similarity,
        id_decay=metrics.decay(similarity),
        fm_ref=metrics.mean_found(to_reference),
        fm_ref_pose=metrics.mean_found(pose),
        fm_inter=step / min(clip.size),
        fm_inter_px=step,
        smoothness=metrics.mean_found(clip.consistencies),
        motion_px=metrics.mean_found(clip.strengths),
        face_found=face_rate >= MIN_FACE_RATE,
        identity_accepted=face_rate >= MIN_FACE_RATE and mean_similarity >= threshold,
        dynamic=metrics.is_dynamic(clip.strengths, clip.size),
    )


def summarise(scores: list[ClipScores]) -> Summary:
    """Of at least one clip."""
    columns = {field.name: np.array([vars(score)[field.name] for score in scores]) for field in fields(ClipScores)}
    return Summary(
        clips=len(scores),
        frames=int(columns["frames"].sum()),
        face_rate=float(columns["faces"].sum() / columns["frames"].sum()),
        means={name: metrics.mean_found(columns[name]) for name in MEANS},
        measured={name: int((~np.isnan(columns[name])).sum()) for name in MEANS},
        success_face=float(columns["face_found"].mean()),
        success_identity=float(columns["identity_accepted"].mean()),
        success_motion=float(columns["dynamic"].mean()),
    )
