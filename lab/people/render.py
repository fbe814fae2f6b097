"""A clip's description becomes frames."""

from __future__ import annotations

import cv2
import numpy as np

from .expressions import blended
from .geometry import Material, load_head
from .person import Person
from .pose import Pose, turn_eyes, view
from .raster import NOTHING, interpolate, rasterize, vertex_normals
from .scene import ClipDescription, at, eased
from .shading import GAMMA, Fragments, albedo, develop, lamp_at, reached_by, shade
from .streams import stream

SMALL = 80  # pixels: up to here a pixel is 3x3 samples, above 2x2
BACKGROUND_CONTRAST = 0.22


def render_clip(person: Person, clip: ClipDescription) -> np.ndarray:
    """(frames, size, size, 3) uint8 RGB."""
    if person.traits != clip.person:
        raise ValueError(f"the clip is of person {clip.person.seed}, not of person {person.traits.seed}")
    samples = 3 if clip.size <= SMALL else 2
    background = paint_background(clip, clip.size * samples)
    parts = np.linspace(0, 1, clip.frames)
    return np.stack([render_frame(person, clip, float(part), background, samples) for part in parts])


def render_frame(
    person: Person, clip: ClipDescription, part: float, background: np.ndarray, samples: int
) -> np.ndarray:
    """(size, size, 3) uint8 RGB at a part, 0..1, of the clip.

    background: (size * samples, size * samples, 3) linear light.
    """
    head, mesh, size = load_head(), person.mesh, clip.size * samples
    moved = eased(part)
    pose = Pose(yaw=at(clip.yaw, moved), pitch=at(clip.pitch, moved), roll=at(clip.roll, moved))
    positions = turn_eyes(person.head_positions(blended(*clip.expressions, moved)), head, pose)
    eyes = positions[head.vertex_materials == Material.EYE].mean(0)
    seen = view(person.mesh_positions(positions, head.triangles), eyes, pose, clip.zoom, size)
    coverage = rasterize(seen.screen, mesh.triangles, size, size, mesh.cutout)
    pixels = np.flatnonzero(coverage.triangle != NOTHING)
    values = interpolate(coverage, mesh.triangles, _attributes(person, seen.centred), pixels)
    fragments = _fragments(values, mesh.materials[coverage.triangle.ravel()[pixels]], pixels, size)

    lamp = lamp_at(clip, part)
    lit = reached_by(lamp, seen.centred, mesh.triangles, mesh.cutout, fragments.position)
    light = shade(fragments, albedo(fragments, person, clip), lamp, lit, person.complexion.gloss)
    picture = background.copy()
    picture.reshape(-1, 3)[pixels] = light
    return develop(cv2.resize(picture, (clip.size, clip.size), interpolation=cv2.INTER_AREA))


def paint_background(clip: ClipDescription, size: int) -> np.ndarray:
    """(size, size, 3) float32 linear light: a wall of the clip's colour, unevenly lit."""
    generator = stream("background", clip.person.seed, clip.clip)
    lighting = generator.uniform(-0.5, 0.5, (3, 3)).astype(np.float32)
    lighting = cv2.resize(lighting, (size, size), interpolation=cv2.INTER_CUBIC)
    wall = np.clip(np.float32(clip.background_colour) * (0.92 + BACKGROUND_CONTRAST * lighting[..., None]), 0.01, 0.97)
    return (wall**GAMMA).astype(np.float32)


def _attributes(person: Person, centred: np.ndarray) -> np.ndarray:
    """(N + C, 14) float32, in the order that _fragments takes them apart."""
    head, mesh = load_head(), person.mesh
    attached = len(mesh.attached)
    tallest = max(float(mesh.layers.max()), 1e-3)
    of_head = np.stack([head.lips, head.mouth_inside, head.ears, head.openness], axis=1)[mesh.source]
    of_attached = np.tile(np.float32([0, 0, 0, 1]), (attached, 1))
    layer = np.concatenate([mesh.layers / tallest, np.ones(attached, np.float32)])[:, None]
    normals = vertex_normals(centred, mesh.triangles)
    columns = [mesh.rest, centred, normals, np.concatenate([of_head, of_attached]), layer]
    return np.concatenate(columns, axis=1).astype(np.float32)


def _fragments(values: np.ndarray, material: np.ndarray, pixels: np.ndarray, size: int) -> Fragments:
    normal = values[:, 6:9] / (np.linalg.norm(values[:, 6:9], axis=1, keepdims=True) + 1e-6)
    # Lashes, hanging hair and tubes are seen from both sides.
    thin = (material == Material.LASHES) | (material >= Material.HAIR)
    normal[thin & (normal[:, 2] < 0)] *= -1
    lips, mouth_inside, ears, openness, layer = values[:, 9:14].T
    return Fragments(
        size=size,
        pixels=pixels,
        material=material,
        rest=values[:, 0:3],
        position=values[:, 3:6],
        normal=normal,
        lips=lips,
        mouth_inside=mouth_inside,
        ears=ears,
        openness=openness,
        layer=layer,
    )
