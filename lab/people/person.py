"""One person, ready to be drawn: geometry, skin and hair put together from a seed."""

from __future__ import annotations

from dataclasses import dataclass, replace

import cv2
import numpy as np

from . import canvas
from .attachment import Attachment, joined
from .facial_hair import paint_beard, paint_brows
from .geometry import UNIT, HeadGeometry, Material, load_head
from .glasses import make_glasses
from .hair import LAYERS, VOLUMES, HeadHair, grow_hair
from .raster import Cutout, vertex_normals
from .shape import shaped_control
from .skin import Complexion, paint_complexion
from .traits import PersonTraits, sample_traits

BEARD_LAYERS = (0.01, 0.025, 0.045)
DROOP = {"medium": 0.35, "long": 0.35}
"""How much the hair above the scalp leans down, of its height."""
FLAT_BEARDS = ("none", "stubble", "goatee", "moustache")
EARLESS, MOUTHLESS = 0.3, 0.5


@dataclass(frozen=True, kw_only=True, eq=False)
class Mesh:
    """What is drawn: the head, copies of parts of it for layers of hair, hanging hair, glasses.

    source: (N,) int32, the head's vertex each vertex copies; what is attached copies none.
    layers: (N,) float32 decimetres above the head, 0 for the head itself.
    attached: (C, 3) float32 positions of hanging hair and glasses, fixed to the head; they come after the N.
    triangles: (T, 3) int32 into N + C vertices. materials: (T,) int8.
    rest: (N + C, 3) float32: where a vertex lies on the head at rest, for everything painted.
    cutout: the outline of the layers.
    """

    source: np.ndarray
    layers: np.ndarray
    attached: np.ndarray
    triangles: np.ndarray
    materials: np.ndarray
    rest: np.ndarray
    cutout: Cutout


@dataclass(frozen=True, kw_only=True, eq=False)
class Person:
    """control: (V, 3) float32 of the face without expression. glasses_colour: (3,) sRGB, whether worn or not."""

    traits: PersonTraits
    control: np.ndarray
    complexion: Complexion
    hair: HeadHair
    glasses_colour: np.ndarray
    mesh: Mesh

    @classmethod
    def from_seed(cls, seed: int) -> Person:
        """The person of a seed; takes about a quarter of a second."""
        head, traits = load_head(), sample_traits(seed)
        control = shaped_control(traits)
        complexion = paint_complexion(traits)
        rest = head.subdivided(control)
        hair = grow_hair(traits, rest)
        glasses, glasses_colour = make_glasses(traits, rest)
        attached = {Material.HAIR: hair.curtain, Material.GLASSES: glasses if traits.glasses else None}
        skin = paint_brows(complexion.skin, hair.colour, traits)
        skin = canvas.over(skin, hair.colour * 0.8, hair.cover)
        skin, beard = paint_beard(skin, hair.colour, traits)
        return cls(
            traits=traits,
            control=control,
            complexion=replace(complexion, skin=skin),
            hair=hair,
            glasses_colour=glasses_colour,
            mesh=build_mesh(head, traits, np.maximum(hair.height, beard), attached),
        )

    def head_positions(self, units: dict[str, float]) -> np.ndarray:
        """(P, 3) float32 of the head with an expression: unit name -> strength."""
        head = load_head()
        control = self.control.copy()
        for unit, strength in units.items():
            control += np.float32(strength) * head.targets[UNIT + unit]
        return head.subdivided(control)

    def mesh_positions(self, positions: np.ndarray, skin_triangles: np.ndarray) -> np.ndarray:
        """(P, 3) positions of the head -> (N + C, 3) of the mesh."""
        normals = vertex_normals(positions, skin_triangles)[self.mesh.source]
        normals[:, 1] -= DROOP.get(self.traits.hair, 0.0)
        points = positions[self.mesh.source] + normals * self.mesh.layers[:, None]
        return np.concatenate([points, self.mesh.attached])


def build_mesh(
    head: HeadGeometry, traits: PersonTraits, heights: np.ndarray, attached: dict[Material, Attachment | None]
) -> Mesh:
    """The head's triangles, then one copy of the hairy ones for each layer, then what is attached.

    heights: (ROWS, COLUMNS) float32, decimetres of hair and beard above the skin.
    """
    column, row = canvas.column_of(head.rest[:, 0], head.rest[:, 2]), canvas.row_of(head.rest[:, 1])
    inside = (row >= 0) & (row < canvas.ROWS)
    nearby = cv2.dilate(heights, np.ones((7, 7), np.uint8))
    tallest = np.zeros(len(head.rest), np.float32)
    place = np.clip(row[inside].astype(int), 0, None), np.clip(column[inside].astype(int), 0, canvas.COLUMNS - 1)
    tallest[inside] = nearby[place]
    tallest[(head.ears > EARLESS) | (head.mouth_inside > MOUTHLESS)] = 0

    triangles, materials = [head.triangles], [head.materials]
    source, layers = [np.arange(len(head.rest), dtype=np.int32)], [np.zeros(len(head.rest), np.float32)]
    offset = len(head.rest)
    skin = head.triangles[head.materials == Material.SKIN]
    for layer in _layers(traits, heights):
        vertices, numbers = np.unique(skin[(tallest[skin] > layer).all(1)], return_inverse=True)
        triangles.append(numbers.reshape(-1, 3) + offset)
        materials.append(np.full(len(triangles[-1]), Material.HAIR, np.int8))
        source.append(vertices.astype(np.int32))
        layers.append(np.full(len(vertices), layer, np.float32))
        offset += len(vertices)
    worn = {material: part for material, part in attached.items() if part is not None}
    extra, extra_triangles = joined(list(worn.values()))
    triangles.append(extra_triangles + offset)
    materials += [np.full(len(part[1]), material, np.int8) for material, part in worn.items()]

    all_sources, all_layers = np.concatenate(source), np.concatenate(layers)
    rest = np.concatenate([head.rest[all_sources], extra])
    thresholds = np.concatenate([all_layers, np.zeros(len(extra), np.float32)])
    coordinates = np.stack([canvas.column_of(rest[:, 0], rest[:, 2]), canvas.row_of(rest[:, 1])], 1)
    return Mesh(
        source=all_sources,
        layers=all_layers,
        attached=extra,
        triangles=np.ascontiguousarray(np.concatenate(triangles), np.int32),
        materials=np.concatenate(materials).astype(np.int8),
        rest=rest,
        cutout=Cutout(coordinates.astype(np.float32), np.ascontiguousarray(heights), thresholds),
    )


def _layers(traits: PersonTraits, heights: np.ndarray) -> list[float]:
    """Decimetres above the scalp, and above the chin of the bearded."""
    layers = [part * float(heights.max()) for part in LAYERS] if VOLUMES[traits.hair] else []
    return sorted(layers + (list(BEARD_LAYERS) if traits.beard not in FLAT_BEARDS else []))
