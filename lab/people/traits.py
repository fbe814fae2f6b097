"""Who a person is, in words and a few numbers: what stays the same in all clips of one seed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .streams import pick, stream

HELD_OUT = 1_000_000
"""Seeds from here on are people for evaluation; training data never holds one."""

YOUNGEST, OLDEST = 20, 78
MIDDLE_AGED_FROM, OLD_FROM = 38, 60
GREY_FROM = 45

HAIR_OF_MEN = {"short": 0.38, "cropped": 0.2, "medium": 0.12, "curly": 0.15, "long": 0.05, "bald": 0.1}
HAIR_OF_WOMEN = {"short": 0.13, "cropped": 0.02, "medium": 0.3, "curly": 0.15, "long": 0.4}
HAIR_COLOURS = {"black": 0.26, "dark brown": 0.22, "brown": 0.18, "light brown": 0.1, "blond": 0.14, "red": 0.1}
DARK_HAIR_COLOURS = {"black": 0.65, "dark brown": 0.3, "brown": 0.05}
GREY_HAIR_COLOURS = {"grey": 0.6, "white": 0.4}
BEARDS = {"none": 0.5, "stubble": 0.16, "beard": 0.18, "goatee": 0.08, "moustache": 0.08}
EYE_COLOURS = {"brown": 0.35, "hazel": 0.15, "green": 0.15, "blue": 0.25, "grey": 0.1}
DARK_EYE_COLOURS = {"dark brown": 0.6, "brown": 0.4}
GLASSES_RATE = 0.14
FRINGE_RATE = {"man": 0.1, "woman": 0.35}
MEN_RATE = 0.5
CONCENTRATION_OF_ANCESTRY = 0.4  # of a symmetric Dirichlet: below 1, mostly one of the three
SKIN_OF_ANCESTRY = (0.12, 0.28, 0.8)
LIGHT_SKIN = 0.45  # up to here hair and eyes come in all colours


@dataclass(frozen=True, kw_only=True)
class PersonTraits:
    """Who a person is; the same in every clip, glasses too.

    ancestry: three shares of the shape of the face that sum to one: of Europe, of Asia, of Africa.
    skin: from 0, the lightest, to 1, the darkest. age: years.
    hair, hair_colour, beard: names from the tables of this file. fringe: whether hair covers the forehead.
    """

    # sex: "man" or "woman". age: 20..78. hair: a key of HAIR_OF_MEN or HAIR_OF_WOMEN. hair_colour: of HAIR_COLOURS or
    # GREY_HAIR_COLOURS. beard: a key of BEARDS. eyes: a colour.

    seed: int
    sex: str
    age: int
    ancestry: tuple[float, float, float]
    skin: float
    hair: str
    hair_colour: str
    fringe: bool
    beard: str
    eyes: str
    glasses: bool

    @property
    def held_out(self) -> bool:
        return self.seed >= HELD_OUT

    @property
    def age_group(self) -> str:
        """One of "young", "middle-aged" and "old"."""
        if self.age < MIDDLE_AGED_FROM:
            return "young"
        return "middle-aged" if self.age < OLD_FROM else "old"


def sample_traits(seed: int) -> PersonTraits:
    """The person of a seed (0 or larger)."""
    generator = stream("traits", seed)
    man = bool(generator.random() < MEN_RATE)
    sex = "man" if man else "woman"
    age = int(np.clip(20 + generator.gamma(2.0, 11.0), YOUNGEST, OLDEST))
    ancestry = generator.dirichlet([CONCENTRATION_OF_ANCESTRY] * 3)
    skin = float(np.clip(ancestry @ SKIN_OF_ANCESTRY + 0.09 * generator.standard_normal(), 0, 1))
    european = skin < LIGHT_SKIN and ancestry[0] > 0.5
    hair = pick(generator, HAIR_OF_MEN if man else HAIR_OF_WOMEN)
    colour = pick(generator, HAIR_COLOURS if european else DARK_HAIR_COLOURS)
    if generator.random() < np.clip((age - GREY_FROM) / 20, 0, 0.95):
        colour = pick(generator, GREY_HAIR_COLOURS)
    return PersonTraits(
        seed=seed,
        sex=sex,
        age=age,
        ancestry=tuple(float(share) for share in ancestry),
        skin=skin,
        hair=hair,
        hair_colour=colour,
        fringe=bool(generator.random() < FRINGE_RATE[sex]) and hair in ("short", "medium", "long"),
        beard=pick(generator, BEARDS) if man else "none",
        eyes=pick(generator, EYE_COLOURS if european else DARK_EYE_COLOURS),
        glasses=bool(generator.random() < GLASSES_RATE),
    )
