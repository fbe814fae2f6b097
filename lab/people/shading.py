"""Light on skin, eyes, teeth, hair and cloth. Works on the N covered pixels of a picture, in linear light."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from . import canvas
from .geometry import EYE_RADIUS, EYE_X, EYE_Y, Material
from .person import Person
from .raster import Cutout, rasterize
from .scene import ClipDescription, at

GAMMA = 2.2
NECKLINES = {"T-shirt": (5.7, 0.2), "turtleneck": (6.0, 0.12)}
"""Height in the middle and its rise to the sides, decimetres on the body at rest."""
EYE_FRONT = 1.245  # z on the head at rest: what is behind it is white
EYE_WHITE, PUPIL = (0.80, 0.775, 0.755), (0.02, 0.018, 0.016)
TEETH, TONGUE, GUMS = (0.86, 0.83, 0.77), (0.60, 0.30, 0.28), (0.42, 0.16, 0.15)
TEETH_DARK_TO_WHITE = (1.15, 1.42)  # z on the head at rest
LASHES_OF_WOMEN, LASHES_OF_MEN = 0.95, 0.5  # how much of the skin behind they hide
KEY, AMBIENT, FILL = 1.3, 1.15, 0.5
WRAP = 0.2  # of skin: how far light reaches beyond the terminator
SCATTER = (0.012, 0.006, 0.0035)  # red, green, blue: blur of light below skin, of the picture's width
SHADOW_PIXELS, SHADOW_WIDTH, SHADOW_BIAS = 256, 4.2, 0.07  # decimetres
SHADOW_SAMPLES = ((0, 0), (-1.2, 0), (1.2, 0), (0, -1.2), (0, 1.2))


@dataclass(frozen=True, kw_only=True, eq=False)
class Fragments:
    """What is seen at the N covered pixels, all float32 unless said.

    pixels: (N,) int, flat indices in a (size, size) picture. material: (N,) int8.
    rest: (N, 3), the place on the head at rest. position, normal: (N, 3) in the view.
    lips, mouth_inside, ears, openness: (N,) 0..1. layer: (N,) 0..1, height in the hair.
    """

    size: int
    pixels: np.ndarray
    material: np.ndarray
    rest: np.ndarray
    position: np.ndarray
    normal: np.ndarray
    lips: np.ndarray
    mouth_inside: np.ndarray
    ears: np.ndarray
    openness: np.ndarray
    layer: np.ndarray


@dataclass(frozen=True, kw_only=True, eq=False)
class Lamp:
    """direction: (3,) float32 of length 1 towards the key light; key, ambient: (3,) colours times strength."""

    direction: np.ndarray
    key: np.ndarray
    ambient: np.ndarray


def lamp_at(clip: ClipDescription, part: float) -> Lamp:
    """The light part of the way, 0..1, through a clip."""
    light = clip.light
    azimuth, elevation = np.radians([at(light.azimuth, part), light.elevation])
    direction = [np.sin(azimuth) * np.cos(elevation), np.sin(elevation), np.cos(azimuth) * np.cos(elevation)]
    return Lamp(
        direction=np.array(direction, np.float32),
        key=np.array([1 + 0.1 * light.warmth, 1, 1 - 0.13 * light.warmth], np.float32) * light.strength,
        ambient=np.array([1 - 0.05 * light.warmth, 1, 1 + 0.07 * light.warmth], np.float32) * light.ambient,
    )


def albedo(fragments: Fragments, person: Person, clip: ClipDescription) -> np.ndarray:
    """(N, 3) float32 sRGB."""
    column = canvas.column_of(fragments.rest[:, 0], fragments.rest[:, 2]).astype(np.float32)
    row = np.clip(canvas.row_of(fragments.rest[:, 1]), 0, canvas.ROWS - 1).astype(np.float32)
    material, complexion = fragments.material, person.complexion
    colour = _skin(fragments, person, _sample(complexion.skin, column, row))
    strands = _sample(person.hair.map, column, row)
    hair = material == Material.HAIR
    colour[hair] = strands[hair] * (0.66 + 0.34 * fragments.layer[hair])[:, None]
    height, rise = NECKLINES[clip.garment]
    neckline = height + rise * np.minimum(1, (fragments.rest[:, 0] / 0.9) ** 2)
    colour[(material == Material.SKIN) & (fragments.rest[:, 1] < neckline)] = clip.clothes_colour
    eyes = material == Material.EYE
    colour[eyes] = _eyes(fragments.rest[eyes], person)
    colour[material == Material.GLASSES] = person.glasses_colour
    teeth, lashes = material == Material.TEETH, material == Material.LASHES
    colour[teeth] = _teeth(fragments.rest[teeth])
    colour[material == Material.TONGUE] = TONGUE
    thickness = LASHES_OF_WOMEN if person.traits.sex == "woman" else LASHES_OF_MEN
    colour[lashes] = (1 - thickness) * complexion.base + thickness * np.minimum(person.hair.colour * 0.3, 0.14)
    return np.clip(colour, 0, 1)


def _sample(picture: np.ndarray, column: np.ndarray, row: np.ndarray) -> np.ndarray:
    """(ROWS, COLUMNS, 3) at N places: (N, 3)."""
    # In pieces, because OpenCV's maps may not be longer than 32767.
    pieces = range(0, max(len(column), 1), 1 << 14)
    return np.concatenate(
        [
            cv2.remap(
                picture, column[start : start + (1 << 14), None], row[start : start + (1 << 14), None], cv2.INTER_LINEAR
            ).reshape(-1, 3)
            for start in pieces
        ]
    )


def _skin(fragments: Fragments, person: Person, painted: np.ndarray) -> np.ndarray:
    complexion = person.complexion
    # The scalp's hair is painted by angle and height, and so would colour the ears.
    colour = painted + fragments.ears[:, None] * (complexion.base.astype(np.float32) * [1.02, 0.94, 0.93] - painted)
    detail = 0.9 + 0.1 * painted.mean(1, keepdims=True) / complexion.base.mean()
    colour = colour + 0.85 * fragments.lips[:, None] * (complexion.lips * detail - colour)
    gums = np.clip(fragments.mouth_inside * 2 - 1, 0, 1)[:, None] * 0.8
    return (colour + gums * (np.array(GUMS) - colour)).astype(np.float32)


def _teeth(rest: np.ndarray) -> np.ndarray:
    """(N, 3): white in front, dark at the back, which the lips shade."""
    in_front = canvas.smoothstep(rest[:, 2], *TEETH_DARK_TO_WHITE)[:, None]
    return np.array(GUMS) + in_front * (np.array(TEETH) - np.array(GUMS))


def _eyes(rest: np.ndarray, person: Person) -> np.ndarray:
    """(N, 3): white, iris and pupil by the distance from the middle of the eyeball's front."""
    complexion = person.complexion
    x, y = rest[:, 0] - np.sign(rest[:, 0]) * EYE_X, rest[:, 1] - EYE_Y
    distance = np.where(rest[:, 2] > EYE_FRONT, np.hypot(x, y) / EYE_RADIUS, 2)
    angle = np.arctan2(y, x)
    colour = np.array(EYE_WHITE) * (1 - 0.3 * np.clip(distance - 0.3, 0, 1))[:, None]
    rays = 1 + 0.15 * np.sin(17 * angle + 3 * np.sin(5 * angle))
    inward = distance / complexion.iris_size
    iris = complexion.iris * (rays * (1.1 - 0.65 * np.clip(inward, 0, 1) ** 5))[:, None]
    colour = np.where((inward < 1)[:, None], iris, colour)
    colour = np.where((inward < complexion.pupil_size)[:, None], PUPIL, colour)
    # The upper lid and its lashes shade the eye.
    return colour * (1 - 0.45 * canvas.smoothstep(y / EYE_RADIUS, 0.0, 0.75))[:, None]


def shade(fragments: Fragments, colour: np.ndarray, lamp: Lamp, lit: np.ndarray, gloss: float) -> np.ndarray:
    """(N, 3) linear light of the fragments. colour: (N, 3) sRGB. lit: (N,), where the main light reaches, 0 to 1."""
    material, normal = fragments.material, fragments.normal
    skin, hair, eye = (material == kind for kind in (Material.SKIN, Material.HAIR, Material.EYE))
    mouth = (material == Material.TEETH) | (material == Material.TONGUE)
    wrap = np.float32(WRAP) * skin
    facing = np.clip((normal @ lamp.direction + wrap) / (1 + wrap), 0, None)
    openness = np.where(hair | eye, np.maximum(fragments.openness, 0.75), fragments.openness)
    openness = np.where(mouth, 0.55, np.maximum(openness, 0.5 * (fragments.mouth_inside > 0.5)))
    lit = np.where(mouth, np.maximum(lit, 0.4), lit)
    sky = (0.62 + 0.38 * normal[:, 1]) * openness
    towards_camera = np.clip(normal @ np.array([-0.6 * lamp.direction[0], 0.1, 0.75], np.float32), 0, 1)
    light = (facing * lit)[:, None] * lamp.key * KEY
    light = light + (sky * AMBIENT + towards_camera * FILL * openness)[:, None] * lamp.ambient
    light = _scatter(light.astype(np.float32), skin, fragments)
    half = lamp.direction + np.array([0, 0, 1], np.float32)
    glint = np.clip(normal @ (half / np.linalg.norm(half)), 0, 1)
    skin_glint = gloss * (0.2 * glint**14 + 0.12 * glint**50) * (1 + 1.5 * fragments.lips)
    shine = np.select(
        [skin, eye, hair, (material == Material.TEETH) | (material == Material.GLASSES)],
        [skin_glint, 1.2 * glint**180, 0.07 * glint**9 * fragments.layer, 0.25 * glint**50],
        0.0,
    )
    rim = 0.05 * (1 - np.clip(normal[:, 2], 0, 1)) ** 3 * (skin | hair)
    return colour**GAMMA * light + (shine * lit)[:, None] * lamp.key + rim[:, None] * lamp.ambient


def _scatter(light: np.ndarray, skin: np.ndarray, fragments: Fragments) -> np.ndarray:
    """Blur the light on skin, red most: light that enters the skin leaves it nearby."""
    size = fragments.size
    mask, picture = np.zeros(size * size, np.float32), np.zeros((size * size, 3), np.float32)
    where = fragments.pixels[skin]
    mask[where], picture[where] = 1, light[skin]
    mask, picture = mask.reshape(size, size), picture.reshape(size, size, 3)
    for channel, sigma in enumerate(SCATTER):
        blurred = cv2.GaussianBlur(picture[..., channel], (0, 0), sigma * size)
        share = cv2.GaussianBlur(mask, (0, 0), sigma * size)
        light[skin, channel] = (blurred / np.maximum(share, 1e-3)).ravel()[where]
    return light


def reached_by(lamp: Lamp, centred: np.ndarray, triangles: np.ndarray, cutout: Cutout, at: np.ndarray) -> np.ndarray:
    """(N,) 0..1: how much of the key light reaches the (N, 3) places `at`; a shadow map with five samples."""
    right = np.cross([0.0, 1.0, 0.0], lamp.direction)
    right = (right / np.linalg.norm(right)).astype(np.float32)
    up = np.cross(lamp.direction, right).astype(np.float32)
    scale, half = np.float32(SHADOW_PIXELS / SHADOW_WIDTH), np.float32(SHADOW_PIXELS / 2)

    def seen_from_lamp(points: np.ndarray) -> np.ndarray:
        x, y, z = (np.einsum("nj,j->n", points, axis) for axis in (right, up, lamp.direction))
        return np.stack([half + x * scale, half - y * scale, z], axis=1)

    depth = rasterize(seen_from_lamp(centred), triangles, SHADOW_PIXELS, SHADOW_PIXELS, cutout).depth
    x, y, z = seen_from_lamp(at).T
    lit = np.zeros(len(at), np.float32)
    for right_by, down_by in SHADOW_SAMPLES:
        column = np.clip(x + right_by, 0, SHADOW_PIXELS - 1).astype(int)
        row = np.clip(y + down_by, 0, SHADOW_PIXELS - 1).astype(int)
        lit += z > depth[row, column] - SHADOW_BIAS
    return lit / len(SHADOW_SAMPLES)


def develop(linear: np.ndarray) -> np.ndarray:
    """Linear light -> uint8 sRGB, with highlights compressed."""
    compressed = linear * (1 + 0.15 * linear) / (1 + 0.45 * linear) * 1.3
    return np.round(np.clip(compressed, 0, 1) ** (1 / GAMMA) * 255).astype(np.uint8)
