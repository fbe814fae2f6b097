"""The shape of a person's head: weights of the shape targets, drawn from the seed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache

import numpy as np

from .geometry import UNIT, HeadGeometry, Material, load_head
from .streams import stream
from .traits import PersonTraits

SPREAD = {
    "head": 0.22,
    "nose": 0.38,
    "mouth": 0.3,
    "eyes": 0.38,
    "cheek": 0.35,
    "chin": 0.32,
    "ears": 0.35,
    "forehead": 0.3,
    "eyebrows": 0.22,
    "neck": 0.12,
}
"""Standard deviation of a slider, by the folder of its targets; a slider runs from -1 to 1."""

CALMER = {
    "eyes/eye-trans": 0.5,
    "eyes/eye-push1": 0.4,
    "eyes/eye-push2": 0.4,
    "eyes/eye-height1": 0.6,
    "eyes/eye-height2": 0.5,
    "eyes/eye-height3": 0.6,
    "nose/nose-curve": 0.6,
    "nose/nose-hump": 0.7,
    "nose/nose-septumangle": 0.6,
    "nose/nose-trans": 0.5,
    "mouth/mouth-trans": 0.5,
    "head/head-age": 0.3,
    "head/head-angle": 0.4,
    "head/head-scale-depth": 0.6,
    "mouth/mouth-angles": 0.5,
    "eyebrows/eyebrows-angle": 0.5,
    "forehead/forehead-nubian": 0.5,
}
"""Factors on SPREAD for sliders that turn a face into a caricature, or into a scowl."""

ONE_SIDED = 0.4  # factor for sliders with one end only: head shapes, ear shapes
LEFT_OUT = (
    "neck/neck-double",
    "mouth/mouth-trans-in",
    "head/head-trans",
    "neck/neck-trans",
    "neck/measure-neck-height",
)
ASYMMETRY_RATE, ASYMMETRY = 0.25, 0.15
SIDE_DIFFERENCE = 0.05
OPPOSITES = (
    ("decr", "incr"),
    ("down", "up"),
    ("in", "out"),
    ("backward", "forward"),
    ("concave", "convex"),
    ("compress", "uncompress"),
)
MASCULINITY = {"man": (0.75, 1.0), "woman": (0.0, 0.18)}
YOUNG_AGE, OLD_AGE = 25, 90  # years that the targets' "young" and "old" stand for
OLDEST_SHAPE = 0.7
WEIGHT_RANGE, MUSCLE_RANGE = (0.15, 0.8), (0.2, 0.8)
EXTREME = 0.8  # sliders end here
TEETH_NARROWED, TEETH_BACK, UPPER_TEETH_DOWN = 0.76, 0.07, 0.05  # a factor, decimetres, decimetres
MOVED_BY_JAW = 0.05

Slider = dict[str, dict[int, str]]
"""Side ("", "l-", "r-") -> sign of the slider -> target."""


def shaped_control(traits: PersonTraits) -> np.ndarray:
    """(V, 3) float32: the control mesh of a person's face at rest, its eyes where those of the head are."""
    head = load_head()
    control = head.control.copy()
    for name, weight in shape_weights(traits, head):
        control += np.float32(weight) * head.targets[name]
    # Sex, age and ancestry change the height of the whole body.
    eyes = head.vertex_materials[: len(control)] == Material.EYE
    return fit_teeth(control, head) + (head.control[eyes].mean(0) - control[eyes].mean(0))


def fit_teeth(control: np.ndarray, head: HeadGeometry) -> np.ndarray:
    """The control mesh with teeth and tongue drawn in: with another jaw they would come through lips and chin."""
    materials = head.vertex_materials[: len(control)]
    teeth, tongue = materials == Material.TEETH, materials == Material.TONGUE
    lower = teeth & (np.linalg.norm(head.targets[UNIT + "jawOpen"], axis=1) > MOVED_BY_JAW)
    upper = teeth & ~lower
    fitted = control.copy()
    fitted[teeth | tongue, 0] *= TEETH_NARROWED
    fitted[teeth | tongue, 2] -= TEETH_BACK
    # The source's upper teeth hide behind the lip of a smile.
    fitted[upper, 1] -= UPPER_TEETH_DOWN
    return fitted


def shape_weights(traits: PersonTraits, head: HeadGeometry) -> Iterator[tuple[str, float]]:
    """Target names and weights; a name may come more than once."""
    generator = stream("shape", traits.seed)
    yield from _macro_weights(traits, head, generator)
    for name, slider in _sliders(tuple(head.targets)).items():
        spread = SPREAD[name.split("/")[0]] * CALMER.get(name, 1.0)
        value = float(np.clip(generator.standard_normal() * spread, -EXTREME, EXTREME))
        difference = float(generator.standard_normal()) * SIDE_DIFFERENCE
        for side, ends in slider.items():
            here = value + difference * {"": 0, "l-": 0.5, "r-": -0.5}[side]
            sign = 1 if here >= 0 else -1
            if sign in ends:
                yield ends[sign], abs(here) * (1.0 if len(ends) == 2 else ONE_SIDED)
    for name in head.targets:
        present, amount = generator.random() < ASYMMETRY_RATE, abs(float(generator.standard_normal())) * ASYMMETRY
        if name.startswith("asym/") and present:
            yield name, amount


def _macro_weights(
    traits: PersonTraits, head: HeadGeometry, generator: np.random.Generator
) -> Iterator[tuple[str, float]]:
    """Sex, age, ancestry, weight and muscle: products of the shares of each."""
    masculinity = generator.uniform(*MASCULINITY[traits.sex])
    old = float(np.clip((traits.age - YOUNG_AGE) / (OLD_AGE - YOUNG_AGE), 0, OLDEST_SHAPE))
    muscle = _thirds(generator.uniform(*MUSCLE_RANGE))
    weight = _thirds(generator.uniform(*WEIGHT_RANGE))
    for sex, share_of_sex in (("male", masculinity), ("female", 1 - masculinity)):
        for age, share_of_age in (("young", 1 - old), ("old", old)):
            share = share_of_sex * share_of_age
            for ancestry, amount in zip(("caucasian", "asian", "african"), traits.ancestry):
                yield f"macro/{ancestry}-{sex}-{age}", share * amount
            for muscle_word, muscle_share in muscle.items():
                for weight_word, weight_share in weight.items():
                    name = f"macro/universal-{sex}-{age}-{muscle_word}muscle-{weight_word}weight"
                    if name in head.targets:
                        yield name, share * muscle_share * weight_share


def _thirds(value: float) -> dict[str, float]:
    """0..1 -> shares of "min", "average" and "max" that sum to 1."""
    return {"min": max(0.0, 1 - 2 * value), "average": 1 - abs(2 * value - 1), "max": max(0.0, 2 * value - 1)}


@cache
def _sliders(targets: tuple[str, ...]) -> dict[str, Slider]:
    """Pair the targets that are two ends of one thing; left and right move together."""
    sliders: dict[str, Slider] = {}
    for target in targets:
        folder, name = target.split("/")
        if folder not in SPREAD:
            continue
        side = name[:2] if name[:2] in ("l-", "r-") else ""
        stem, sign = _end_of_slider(name.removeprefix(side))
        if f"{folder}/{stem}" not in LEFT_OUT:
            sliders.setdefault(f"{folder}/{stem}", {}).setdefault(side, {})[sign] = target
    return sliders


def _end_of_slider(name: str, opposites: Iterable[tuple[str, str]] = OPPOSITES) -> tuple[str, int]:
    for low, high in opposites:
        for end, sign in ((low, -1), (high, 1)):
            if name.endswith(f"-{end}"):
                return name.removesuffix(f"-{end}"), sign
    return name, 1
