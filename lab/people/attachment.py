"""Meshes that are fixed to the head: hanging hair and glasses."""

from __future__ import annotations

import numpy as np

from .geometry import triangulated

Attachment = tuple[np.ndarray, np.ndarray]
"""(positions (N, 3) float32 decimetres, triangles (M, 3) int32)."""

NOTHING_WORN: Attachment = (np.zeros((0, 3), np.float32), np.zeros((0, 3), np.int32))


def joined(parts: list[Attachment]) -> Attachment:
    """Several meshes as one."""
    if not parts:
        return NOTHING_WORN
    offsets = np.cumsum([0, *(len(positions) for positions, _ in parts[:-1])])
    triangles = [triangles + offset for (_, triangles), offset in zip(parts, offsets)]
    return np.concatenate([positions for positions, _ in parts]), np.concatenate(triangles).astype(np.int32)


def sheet(positions: np.ndarray, *, tube: bool = False, ring: bool = False) -> Attachment:
    """A grid of places, (rows, columns, 3), as a mesh.

    tube: the last column joins the first; ring: the last row joins the first.
    """
    rows, columns, _ = positions.shape
    index = np.arange(rows * columns).reshape(rows, columns)
    upper = np.arange(rows if ring else rows - 1)
    left = np.arange(columns if tube else columns - 1)
    here, below = index[upper], index[(upper + 1) % rows]
    right = (left + 1) % columns
    quads = np.stack([here[:, left], below[:, left], below[:, right], here[:, right]], axis=-1)
    return positions.reshape(-1, 3).astype(np.float32), triangulated(quads.reshape(-1, 4))
