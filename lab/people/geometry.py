"""The head that every person is a variation of: a mesh, its shape targets and its expression units.

The data is the `head.npz` beside this file, made by `scripts/build_head.py`; the licence beside it says where it comes
from. Units are decimetres: x to the right of the viewer (the left of the person), y up, z towards the viewer.
"""

# Where the head comes from: HEAD_LICENSE.md.

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from pathlib import Path

import numpy as np
from scipy.sparse import csr_matrix

HEAD_FILE = Path(__file__).with_name("head.npz")
UNIT = "unit/"
"""Prefix of the targets that are expressions (ARKit's names); "Left" in them is the person's left."""


EYE_X, EYE_Y, EYE_RADIUS = 0.308, 7.284, 0.142
"""Middle, left and right, and radius of the eyeballs at rest; every person's eyes are brought to this height."""


class Material(IntEnum):
    """What a triangle of the head is made of."""

    SKIN = 0
    EYE = 1
    TEETH = 2
    TONGUE = 3
    LASHES = 4
    HAIR = 5
    GLASSES = 6
    """These two are not in the file: they are made for each person."""


@dataclass(frozen=True, kw_only=True, eq=False)
class HeadGeometry:
    """A control mesh with targets, and the finer mesh that is drawn.

    control: (V, 3) float32, rest positions of the control mesh.
    targets: name -> (V, 3) float32 offsets at strength 1.
    subdivision: (P, V) sparse float32, control positions -> drawn positions, which is one step of subdivision as by
    Catmull and Clark.
    triangles: (T, 3) int32 of drawn vertices, counter-clockwise from outside.
    materials: (T,) int8, a Material each.
    rest: (P, 3) float32, the drawn positions at rest, which are the coordinates that everything painted refers to.
    vertex_materials: (P,) int8; the first V are those of the control mesh.
    lips, mouth_inside, ears: (P,) float32, 0..1.
    openness: (P,) float32, from 0 to 1, how much of the sky a vertex sees at rest, that is ambient occlusion.
    """

    control: np.ndarray
    targets: dict[str, np.ndarray]
    subdivision: csr_matrix
    triangles: np.ndarray
    materials: np.ndarray
    rest: np.ndarray
    vertex_materials: np.ndarray
    lips: np.ndarray
    mouth_inside: np.ndarray
    ears: np.ndarray
    openness: np.ndarray

    def subdivided(self, control: np.ndarray) -> np.ndarray:
        """(V, 3) control positions -> (P, 3) float32 drawn positions."""
        return np.asarray(self.subdivision @ control, np.float32)


@cache
def load_head() -> HeadGeometry:
    """The packaged head; read once a process. Nobody may write to its arrays."""
    with np.load(HEAD_FILE) as file:
        data = {name: file[name] for name in file.files}
    control = data["control"]
    names = [str(name) for name in data["target_names"]]
    subdivision = csr_matrix(
        (data["subdivision_data"], data["subdivision_indices"], data["subdivision_indptr"]),
        shape=(len(data["subdivision_indptr"]) - 1, len(control)),
    )
    quads, quad_materials = data["quads"].astype(np.int32), data["quad_materials"]
    vertex_materials = np.zeros(subdivision.shape[0], np.int8)
    vertex_materials[quads] = quad_materials[:, None]
    masks = {name: data[name].astype(np.float32) for name in ("lips", "mouth_inside", "ears", "openness")}
    return HeadGeometry(
        control=control,
        targets=dict(zip(names, data["targets"].astype(np.float32))),
        subdivision=subdivision,
        triangles=triangulated(quads),
        materials=np.concatenate([quad_materials, quad_materials]),
        rest=np.asarray(subdivision @ control, np.float32),
        vertex_materials=vertex_materials,
        **masks,
    )


def triangulated(quads: np.ndarray) -> np.ndarray:
    """(Q, 4) -> (2Q, 3) int32: the first halves of all quads, then the second halves."""
    return np.ascontiguousarray(np.concatenate([quads[:, [0, 1, 2]], quads[:, [0, 2, 3]]]), np.int32)
