"""The metrics of a clip, as numpy functions of what was found in its frames (paper, Sec. 4.1 and A.2).

A frame without a face is a row of NaN and stays one: nothing is put in its place. Whatever cannot be measured is NaN.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

BOOTSTRAP_DRAWS = 1000
DECAY_SAMPLES = 16  # frames, evenly spaced over the clip, that the decay is measured on
DECAY_PART = 0.25  # of those samples: the first part is compared with the last
TOP_FLOW_PART = 0.05  # VBench: a frame moves as much as the fastest twentieth of its pixels
DYNAMIC_FLOW = 6.0  # VBench: pixels between two frames whose shorter side is FLOW_SIDE
FLOW_SIDE = 256
DYNAMIC_PART = 0.25  # VBench: so many of the frames must move for the clip to be dynamic
YAW_LIMITS = (20.0, 45.0)  # degrees: nearly frontal, turned, and beyond
STILL_FLOW = 0.25  # pixels: flow of this size is the codec's noise, whose direction means nothing


def mean_direction(embeddings: np.ndarray, centre: np.ndarray | None = None) -> np.ndarray:
    """What a person's frames are compared with: the mean of the references' normalised embeddings, at length 1.

    embeddings: (R, C), of any lengths. centre: as in `similarities`. Returns (C,).
    """
    return _unit(_directions(embeddings, centre).mean(axis=0))


def similarities(embeddings: np.ndarray, references: np.ndarray, centre: np.ndarray | None = None) -> np.ndarray:
    """Cosine of each frame's embedding to the mean of the references', (F,), -1 to 1; NaN without a face.

    The mean, not the photo that the clip was made from: this does not reward copying that photo (paper, Sec. 4.1).

    embeddings: (F, C), NaN rows where there is no face. references: (R, C), R >= 1 photos of the person.
    centre: (C,) mean of normalised embeddings of many people, subtracted from every normalised embedding. For faces of
        one kind, such as rendered ones, whose embeddings all share a direction that tells nobody apart.
    """
    return _directions(embeddings, centre) @ mean_direction(references, centre)


def decay(similarity: np.ndarray) -> float:
    """How much likeness is lost along a clip: mean of its beginning minus mean of its end, -2 to 2; 0 if it stays.

    Over DECAY_SAMPLES evenly spaced frames (all, if there are fewer), the first quarter minus the last quarter. A clip
    that turns into another person half way shows the whole difference, an even fade four fifths of it.

    similarity: (F,). NaN if either quarter has no face.
    """
    sampled = similarity[sample_evenly(len(similarity), DECAY_SAMPLES)]
    part = max(1, int(len(sampled) * DECAY_PART))
    return mean_found(sampled[:part]) - mean_found(sampled[-part:])


def success_by_yaw(similarity: np.ndarray, yaws: np.ndarray, threshold: float) -> tuple[float, float, float]:
    """The part, 0 to 1, that reaches the threshold of the faces turned by less than 20 degrees, by 20 to 45, by more.

    similarity, yaws: (F,), NaN without a face. NaN where no face is turned so far.
    """
    accepted = np.where(np.isnan(similarity), np.nan, similarity >= threshold)
    turned = np.digitize(np.abs(np.nan_to_num(yaws)), YAW_LIMITS)
    return tuple(mean_found(accepted[turned == number]) for number in range(len(YAW_LIMITS) + 1))


def bootstrap(values: np.ndarray, people: Sequence[str]) -> tuple[float, float]:
    """The 95% percentile interval of the mean over clips, from 1,000 draws of people, the same ones every time.

    People are drawn, with all of their clips, since clips of one person are alike. values: (N,) a clip each, NaN where
    it could not be measured. people: whose clip each is. NaN with fewer than two people that could be measured.
    """
    found = ~np.isnan(values)
    _, owners = np.unique(np.asarray(people)[found], return_inverse=True)
    number = owners.max(initial=-1) + 1
    if number < 2:
        return float("nan"), float("nan")
    sums, counts = np.bincount(owners, values[found]), np.bincount(owners)
    drawn = np.random.default_rng(0).integers(number, size=(BOOTSTRAP_DRAWS, number))
    low, high = np.percentile(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1), (2.5, 97.5))
    return float(low), float(high)


def sample_evenly(frames: int, samples: int) -> np.ndarray:
    """Indices of at most `samples` of `frames` frames, evenly spaced, with the first and the last."""
    return np.linspace(0, frames - 1, min(frames, samples)).round().astype(int)


def motion_to_reference(
    landmarks: np.ndarray, frame_size: tuple[int, int], reference: np.ndarray, reference_size: tuple[int, int]
) -> np.ndarray:
    """FM_ref of each frame: how differently from the reference photo the face is posed, (F,), 0 to 2 (paper, A.2).

    Frame and photo are resized to one square, which aligns their aspect ratios; the five landmarks of each are moved to
    have their mean at 0 and scaled to length 1; the result is the L2 distance of these (10,) vectors. Where and how
    large the face is does not matter; tilt, turn and expression do, and so does a difference of the aspect ratios: the
    same face in 720 x 480 and in a portrait of 4:5 is at 0.3. Equal sizes, such as (1, 1), leave the square out.
    NaN without a face.

    landmarks: (F, 5, 2) x y in pixels. reference: (5, 2), likewise. Sizes: width and height of the pictures in pixels.
    """
    shapes = _aligned_shapes(landmarks, frame_size)
    return np.linalg.norm(shapes - _aligned_shapes(reference[None], reference_size), axis=1)


def motion_between(landmarks: np.ndarray) -> np.ndarray:
    """How far the face went from each frame to the next, (F - 1,), in pixels of the frames (paper, A.2).

    The root mean square over the five landmarks' distances: k for a face that is shifted by k pixels. NaN where either
    frame has no face; a gap is never bridged. FM_inter is the largest of these.

    landmarks: (F, 5, 2) x y in pixels.
    """
    steps = np.diff(landmarks, axis=0)
    return np.sqrt((steps**2).sum(axis=2).mean(axis=1))


def flow_strength(flow: np.ndarray) -> float:
    """How much moves between two frames, in pixels: mean length of the fastest twentieth of the flow (as in VBench).

    flow: (H, W, 2), x y in pixels.
    """
    lengths = np.sort(np.linalg.norm(flow, axis=2).ravel())
    fastest = max(1, int(len(lengths) * TOP_FLOW_PART))
    return float(lengths[-fastest:].mean())


def is_dynamic(strengths: np.ndarray, frame_size: tuple[int, int]) -> bool:
    """Whether a clip counts as dynamic: whether a quarter of its frames move by more than a limit, as VBench has it.

    strengths: (F - 1,) of the flow; a clip of one frame is not dynamic. frame_size: width and height in pixels.
    """
    needed = round(DYNAMIC_PART * (len(strengths) + 1))
    limit = DYNAMIC_FLOW * min(frame_size) / FLOW_SIDE
    return bool(len(strengths)) and int((strengths > limit).sum()) >= max(1, needed)


def flow_consistency(flow: np.ndarray, following: np.ndarray) -> float:
    """How steadily pixels move on, 0 to 1: one for constant velocity and for stillness, near zero for shaking.

    Compares the flow of a pixel with the flow of where it went. Pixels that leave the picture are left out; NaN if all
    do.

    flow: (H, W, 2) from a frame to the next, in pixels. following: the same from that one to the one after it.
    """
    # 1 - sum |b - a| / sum (|a| + |b| + STILL_FLOW): a is a pixel's flow, b the flow of where it went.
    height, width = flow.shape[:2]
    columns, rows = np.meshgrid(np.arange(width), np.arange(height))
    columns = np.rint(columns + flow[..., 0]).astype(int)
    rows = np.rint(rows + flow[..., 1]).astype(int)
    inside = (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)
    if not inside.any():
        return float("nan")
    before, after = flow[inside], following[rows[inside], columns[inside]]
    change = np.linalg.norm(after - before, axis=1).sum()
    total = (np.linalg.norm(before, axis=1) + np.linalg.norm(after, axis=1) + STILL_FLOW).sum()
    return float(1 - change / total)


def mean_found(values: np.ndarray) -> float:
    """Mean of the values that are not NaN; NaN if there is none."""
    found = values[~np.isnan(values)]
    return float(found.mean()) if len(found) else float("nan")


def largest_found(values: np.ndarray) -> float:
    """Largest of the values that are not NaN; NaN if there is none."""
    found = values[~np.isnan(values)]
    return float(found.max()) if len(found) else float("nan")


def _directions(embeddings: np.ndarray, centre: np.ndarray | None) -> np.ndarray:
    """(N, C) of length 1."""
    directions = _unit(np.asarray(embeddings, np.float64))
    return directions if centre is None else _unit(directions - centre)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def _aligned_shapes(landmarks: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(N, 5, 2) pixels of a picture of `size` -> (N, 10): position and scale taken out, length 1."""
    square = landmarks / np.asarray(size, np.float64)
    return _unit((square - square.mean(axis=1, keepdims=True)).reshape(len(landmarks), -1))
