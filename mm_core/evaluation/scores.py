"""The numbers of one clip, and of many clips together."""

from __future__ import annotations

import math
from collections.abc import Sequence
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
    id_similarity_dlib, id_similarity_sface: as id_similarity, by recognisers that no model was trained with.
    facesim_arc, facesim_cur: OpenS2V-Eval's, 0 to 1. motion_amplitude: OpenS2V-Eval's, in pixels.
    success_yaw_20, _45, _beyond: the part of the faces that reach the threshold, of those turned by less than 20
        degrees, by 20 to 45, and by more, 0 to 1.
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
    motion_amplitude: float = math.nan
    success_yaw_20: float = math.nan
    success_yaw_45: float = math.nan
    success_yaw_beyond: float = math.nan
    text_alignment: float = math.nan
    id_similarity_dlib: float = math.nan
    id_similarity_sface: float = math.nan
    facesim_arc: float = math.nan
    facesim_cur: float = math.nan


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Means over clips, each over the clips that it could be measured on, and rates of all clips, 0 to 1.

    measured: for each mean, on how many clips. face_rate is over all frames of all clips.
    intervals: of each mean and rate, as `metrics.bootstrap`.
    """

    clips: int
    frames: int
    face_rate: float
    means: dict[str, float]
    measured: dict[str, int]
    success_face: float
    success_identity: float
    success_motion: float
    intervals: dict[str, tuple[float, float]]


MEANS = (
    *("id_similarity", "id_decay", "fm_ref", "fm_ref_pose", "fm_inter", "fm_inter_px", "smoothness", "motion_px"),
    *("text_alignment", "id_similarity_dlib", "id_similarity_sface", "facesim_arc", "facesim_cur"),
    *("motion_amplitude", "success_yaw_20", "success_yaw_45", "success_yaw_beyond"),
)
RATES = {"success_face": "face_found", "success_identity": "identity_accepted", "success_motion": "dynamic"}


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
    yaw_20, yaw_45, yaw_beyond = metrics.success_by_yaw(similarity, clip.yaws, threshold)
    judged = {
        f"id_similarity_{name}": metrics.mean_found(metrics.similarities(found, person.judged[name]))
        for name, found in clip.judged.items()
        if found.size
    }
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
        motion_amplitude=clip.amplitude,
        success_yaw_20=yaw_20,
        success_yaw_45=yaw_45,
        success_yaw_beyond=yaw_beyond,
        **judged,
    )


def summarise(scores: list[ClipScores], people: Sequence[str]) -> Summary:
    """Of at least one clip. people: whose clip each is."""
    columns = {field.name: np.array([vars(score)[field.name] for score in scores]) for field in fields(ClipScores)}
    measures = {name: columns[name] for name in MEANS} | {name: columns[of] for name, of in RATES.items()}
    measures["face_rate"] = columns["faces"] / columns["frames"]
    return Summary(
        clips=len(scores),
        frames=int(columns["frames"].sum()),
        face_rate=float(columns["faces"].sum() / columns["frames"].sum()),
        means={name: metrics.mean_found(columns[name]) for name in MEANS},
        measured={name: int((~np.isnan(columns[name])).sum()) for name in MEANS},
        **{name: float(columns[of].mean()) for name, of in RATES.items()},
        intervals={name: metrics.bootstrap(values.astype(float), people) for name, values in measures.items()},
    )
