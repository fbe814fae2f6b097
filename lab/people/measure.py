"""Measure how well a real face detector and a real ArcFace tell the rendered people apart; prints a Markdown table.

Two clips each of people from the held-out seeds, four frames a clip; cosines between frames of different clips only.
"Centred" subtracts the mean embedding of other, training people first. Uses SCRFD-500M and w600k_mbf (buffalo_sc),
which InsightFace licenses for non-commercial research only.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from mm_core.faces.analysis import FaceAnalyzer, select_face
from scripts import environment

from .person import Person
from .render import render_clip
from .scene import sample_clip
from .traits import HELD_OUT

CLIPS, FRAMES_SHOWN = 2, 4
CENTRING_PEOPLE = 50  # training people whose mean embedding is subtracted


@dataclass(frozen=True, kw_only=True, eq=False)
class Embedded:
    """embeddings: (N, 512), of length 1. people, clips: (N,) of the frames with a face. found: share of all frames."""

    embeddings: np.ndarray
    people: np.ndarray
    clips: np.ndarray
    found: float


def main() -> None:
    """Render, embed, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--people", type=int, default=150)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64])
    args = parser.parse_args()
    analyzer = FaceAnalyzer(environment.face_models(), "buffalo_sc", device="cpu")
    print("| | found | same person: mean / 5% / min | different: mean / 99% / max | rank-1 | equal error rate (at) |")
    print("|---|---|---|---|---|---|")
    for size in args.sizes:
        measured = embed(analyzer, range(HELD_OUT, HELD_OUT + args.people), size)
        centre = embed(analyzer, range(CENTRING_PEOPLE), size).embeddings.mean(0)
        print(table_row(f"{size} px", measured, np.zeros(1)))
        print(table_row(f"{size} px, centred", measured, centre))


def embed(analyzer: FaceAnalyzer, seeds: range, size: int) -> Embedded:
    """Every shown frame of every clip of the people."""
    embeddings, people, clips, frames_seen = [], [], [], 0
    for seed in tqdm(seeds, unit="person", leave=False):
        person = Person.from_seed(seed)
        for clip in range(CLIPS):
            frames = render_clip(person, sample_clip(seed, clip, size=size))
            for index in np.linspace(0, len(frames) - 1, FRAMES_SHOWN).round().astype(int):
                frames_seen += 1
                faces = analyzer.detect(frames[index])
                if faces:
                    embeddings.append(select_face(faces, "largest").normed_embedding)
                    people.append(seed)
                    clips.append(clip)
    return Embedded(
        embeddings=np.array(embeddings),
        people=np.array(people),
        clips=np.array(clips),
        found=len(embeddings) / frames_seen,
    )


def table_row(name: str, measured: Embedded, centre: np.ndarray) -> str:
    """One row of the table; centre: (512,) or (1,), subtracted from the embeddings."""
    vectors = measured.embeddings - centre
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = vectors @ vectors.T
    later = np.triu(np.ones_like(cosines, bool), 1)
    same_person = measured.people[:, None] == measured.people
    same = cosines[later & same_person & (measured.clips[:, None] != measured.clips)]
    different = cosines[later & ~same_person]
    error, threshold = equal_error_rate(same, different)
    return (
        f"| {name} | {measured.found:.1%} "
        f"| {same.mean():.3f} / {np.quantile(same, 0.05):.3f} / {same.min():.3f} "
        f"| {different.mean():.3f} / {np.quantile(different, 0.99):.3f} / {different.max():.3f} "
        f"| {rank_1(vectors, measured):.1%} | {error:.3f} ({threshold:.2f}) |"
    )


def rank_1(vectors: np.ndarray, measured: Embedded) -> float:
    """Share of the later clips' frames whose nearest person, by the mean of the first clip, is the right one."""
    gallery_people = np.unique(measured.people[measured.clips == 0])
    gallery = np.stack(
        [vectors[(measured.people == person) & (measured.clips == 0)].mean(0) for person in gallery_people]
    )
    gallery /= np.linalg.norm(gallery, axis=1, keepdims=True)
    probes = measured.clips > 0
    nearest = gallery_people[(vectors[probes] @ gallery.T).argmax(1)]
    return float((nearest == measured.people[probes]).mean())


def equal_error_rate(same: np.ndarray, different: np.ndarray) -> tuple[float, float]:
    """The rate at which as many pairs of one person are rejected as pairs of two are accepted, and its threshold."""
    thresholds = np.linspace(-1, 1, 2001)
    rejected = np.searchsorted(np.sort(same), thresholds) / len(same)
    accepted = 1 - np.searchsorted(np.sort(different), thresholds) / len(different)
    best = int(np.abs(rejected - accepted).argmin())
    return float(rejected[best] + accepted[best]) / 2, float(thresholds[best])


if __name__ == "__main__":
    main()
