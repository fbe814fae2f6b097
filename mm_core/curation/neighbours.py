"""What is alike among all that passed the rules, by nearest neighbours and not by all pairs: duplicates, identities
that repeat, and the references of a clip in other clips of its person."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from .config import Keeping
from .measure import Row, spread, unpacked

EXACT = 50_000
"""Up to so many are compared one with the other; more are first divided into groups of like ones, of which the nearest
PROBES are searched."""
PROBES = 16
_QUERIES = 4096  # at a time
_HASH_BYTES = 32

Pairs = Iterator[tuple[int, int, float]]


def near_hashes(hashes: np.ndarray, most: int) -> Pairs:
    """Pairs i < j of (N, 32) uint8 that differ in at most so many bits, and in how many."""
    import faiss

    index: faiss.IndexBinary = faiss.IndexBinaryFlat(8 * _HASH_BYTES)
    if len(hashes) > EXACT:
        index = faiss.IndexBinaryIVF(index, 8 * _HASH_BYTES, _groups(len(hashes)))
        index.train(hashes)
        index.nprobe = PROBES
    return _found(index, hashes, most + 1)  # of binary indices the radius itself is excluded


def near_faces(embeddings: np.ndarray, least: float) -> Pairs:
    """Pairs i < j of (N, 512) float32 of length 1 with at least this cosine, and the cosine."""
    import faiss

    index: faiss.Index = faiss.IndexFlatIP(embeddings.shape[1])
    if len(embeddings) > EXACT:
        index = faiss.IndexIVFFlat(
            index, embeddings.shape[1], _groups(len(embeddings)), faiss.METRIC_INNER_PRODUCT
        )
        index.train(embeddings)
        index.nprobe = PROBES
    return _found(index, embeddings, least)


def _groups(count: int) -> int:
    return round(count**0.5)


def _found(index: object, vectors: np.ndarray, radius: float) -> Pairs:
    index.add(vectors)
    for first in range(0, len(vectors), _QUERIES):
        limits, distances, others = index.range_search(vectors[first : first + _QUERIES], radius)
        for query, (start, stop) in enumerate(pairwise(limits), first):
            for other, distance in sorted(zip(others[start:stop].tolist(), distances[start:stop].tolist())):
                if query < other:
                    yield query, other, distance


def duplicates(rows: Sequence[Row], keep: Keeping) -> dict[int, tuple[str, str]]:
    """Numbers of the rows that show what a better one shows, and why. Of two, the one with more lines is the better
    one, then the one that comes first; clips of one video are no duplicates of each other."""
    order = sorted(range(len(rows)), key=lambda at: -min(rows[at]["size"]))
    dropped: dict[int, tuple[str, str]] = {}
    first: dict[str, int] = {}
    for at in order:
        if first.setdefault(rows[at]["id"], at) != at:
            dropped[at] = "duplicate", f"the same file as {rows[first[rows[at]['id']]]['name']}"
    left = [at for at in order if at not in dropped]
    if not left:
        return dropped
    hashes = np.stack([np.frombuffer(bytes.fromhex(rows[at]["hash"]), np.uint8) for at in left])
    near: dict[int, list[int]] = {}
    for one, other, _ in near_hashes(np.ascontiguousarray(hashes[:, :_HASH_BYTES]), keep.near_duplicate):
        bits = np.unpackbits(hashes[one] ^ hashes[other]).reshape(-1, 8 * _HASH_BYTES).sum(1)
        if bits.max() <= keep.near_duplicate and not _same_video(rows[left[one]], rows[left[other]]):
            near.setdefault(other, []).append(one)
    for other, ones in sorted(near.items()):
        better = next((one for one in sorted(ones) if left[one] not in dropped), None)
        if better is not None:
            dropped[left[other]] = "near duplicate", f"nearly the same as {rows[left[better]]['name']}"
    return dropped


def _same_video(one: Row, other: Row) -> bool:
    return "of" in one and one["of"] == other["of"]


def repeated_identities(rows: Sequence[Row], keep: Keeping) -> dict[int, tuple[str, str]]:
    """Numbers of the pairs whose reference is another picture of a person who is there already."""
    references = {row["reference"]: row["identity"] for row in sorted(rows, key=lambda row: row["reference"])}
    if not references:
        return {}
    names = list(references)
    embeddings = np.stack([unpacked(identity) for identity in references.values()])
    near: dict[int, list[int]] = {}
    for one, other, _ in near_faces(embeddings, keep.same_identity):
        near.setdefault(other, []).append(one)
    gone: set[int] = set()
    for other, ones in sorted(near.items()):
        if any(one not in gone for one in ones):
            gone.add(other)
    removed = {names[at] for at in gone}
    return {
        at: ("identity", "its reference shows a person who is there already")
        for at, row in enumerate(rows)
        if row["reference"] in removed
    }


def cross_references(rows: Sequence[Row], keep: Keeping) -> tuple[list[list[tuple[int, int]]], list[int]]:
    """For each clip its references, as number of another clip and frame in it, and the number of its person.

    Faces of two clips that are alike, but not too much, are one person's. Of those that a clip may have the ones are
    taken that are farthest apart in yaw; [] where there is none.
    """
    places = [(at, key["frame"], key["yaw"]) for at, row in enumerate(rows) for key in row["keys"]]
    person = list(range(len(rows)))
    may: list[dict[int, None]] = [{} for _ in rows]

    def root(at: int) -> int:
        while person[at] != at:
            person[at] = person[person[at]]
            at = person[at]
        return at

    if places:
        embeddings = np.stack([unpacked(key["embedding"]) for row in rows for key in row["keys"]])
        for one, other, cosine in near_faces(embeddings, keep.min_reference_cosine):
            clip, another = places[one][0], places[other][0]
            if clip == another or rows[clip]["id"] == rows[another]["id"]:
                continue
            first, second = sorted((root(clip), root(another)))
            person[second] = first
            if cosine <= keep.max_reference_cosine:
                may[clip][other] = may[another][one] = None
    references = []
    for options in may:
        chosen = sorted(options)
        taken = spread([places[at][2] for at in chosen], keep.references)
        references.append([places[chosen[at]][:2] for at in taken])
    return references, [root(at) for at in range(len(rows))]
