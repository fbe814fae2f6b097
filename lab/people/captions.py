"""Tells a clip in words: a pure function of its description, so every caption is true of the pictures.

Directions are the viewer's: "turns left" is towards the left edge of the picture.
"""

from __future__ import annotations

import numpy as np

from .expressions import NEUTRAL
from .scene import ClipDescription, Path
from .streams import stream
from .traits import PersonTraits

TRIGGER = "img"
"""Follows the word that names the person; the prompt parser replaces that word by the identity."""

TURNED = 15.0  # degrees between first and last frame that are told as a movement
NODDED, TILTED = 9.0, 7.0
FACING = 9.0  # degrees of yaw that still face the camera
SIDE_LIGHT = 35.0  # degrees of the light's azimuth
DIM, WARM = 0.75, 0.6

BEGINS = {
    "smile": ("smiles", "starts to smile", "breaks into a smile"),
    "grin": ("grins", "smiles broadly", "smiles and shows the teeth"),
    "open mouth": ("opens the mouth", "opens the mouth wide"),
    "raised brows": ("raises the eyebrows", "lifts the eyebrows"),
    "frown": ("frowns", "begins to frown"),
    "closed eyes": ("closes the eyes", "shuts the eyes"),
    "pout": ("puckers the lips", "pouts"),
}
ENDS = {
    "smile": ("stops smiling", "lets the smile fade"),
    "open mouth": ("closes the mouth",),
    "raised brows": ("lowers the eyebrows",),
    "closed eyes": ("opens the eyes",),
}
KEEPS = {
    "smile": ("is smiling", "keeps smiling"),
    "open mouth": ("keeps the mouth open",),
    "raised brows": ("keeps the eyebrows raised",),
    "closed eyes": ("keeps the eyes closed",),
}
STILL = ("looks calm", "holds still", "stays still")
NO_END_BEFORE = {("smile", "grin"), ("open mouth", "grin")}
"""Expressions that pass into one another: nothing ends."""

SMILES = ("smile", "grin")

BEARD_WORDS = {"stubble": "stubble", "beard": "a beard", "goatee": "a goatee", "moustache": "a moustache"}
HAIR_WORDS = {
    "short": ("short {} hair",),
    "cropped": ("cropped {} hair", "very short {} hair"),
    "medium": ("chin-length {} hair", "{} hair down to the chin"),
    "long": ("long {} hair",),
    "curly": ("curly {} hair",),
    "bald": ("no hair",),
}


def caption(clip: ClipDescription) -> str:
    """One sentence, such as "A bearded man img turns left and smiles, wearing a red T-shirt, before a green wall."."""
    choose = stream("wording", clip.wording)
    subject = _subject(clip.person, choose)
    actions = _joined(_actions(clip, choose))
    clothes = _one(choose, ("wearing {}", "in {}")).format(_with_article(f"{clip.clothes} {clip.garment}"))
    place = _one(choose, ("in front of {}", "before {}", "against {}")).format(
        _with_article(f"{clip.background} {_one(choose, ('background', 'wall'))}")
    )
    light = _light(clip, choose)
    order = [f"{subject} {actions}", clothes, place]
    if choose.random() < 0.3:
        order = [f"{subject}, {clothes}, {actions}", place]
    sentence = ", ".join(order + ([light] if light and choose.random() < 0.5 else []))
    return sentence[0].upper() + sentence[1:] + "."


def turn(clip: ClipDescription) -> str:
    """Where the face moves in the picture: "left", "right" or "" for nowhere."""
    return _direction(clip.yaw, TURNED, "right", "left")


def nod(clip: ClipDescription) -> str:
    """Where the face moves: "up", "down" or "" for nowhere."""
    return _direction(clip.pitch, NODDED, "up", "down")


def tilt(clip: ClipDescription) -> str:
    """Where the top of the head moves in the picture: "left", "right" or "" for nowhere."""
    return _direction(clip.roll, TILTED, "right", "left")


def smiles(clip: ClipDescription) -> bool:
    """Whether a smile or a grin begins."""
    begin, end = clip.expressions
    return end in SMILES and begin not in SMILES


def _direction(path: Path, least: float, positive: str, negative: str) -> str:
    change = path[1] - path[0]
    if abs(change) < least:
        return ""
    return positive if change > 0 else negative


def _subject(person: PersonTraits, choose: np.random.Generator) -> str:
    """Age, beard or hair before the noun; up to two more features after the trigger."""
    before = [person.age_group] if choose.random() < 0.7 else []
    after = []
    if person.hair == "bald":
        before.append("bald")
    elif choose.random() < 0.75:
        after.append(_one(choose, HAIR_WORDS[person.hair]).format(person.hair_colour))
    if person.beard == "beard" and choose.random() < 0.5:
        before.append("bearded")
    elif person.beard != "none":
        after.append(BEARD_WORDS[person.beard])
    if person.glasses:
        after.append("glasses")
    described = f" with {_joined(after)}" if after else ""
    return f"{_with_article(' '.join([*before, person.sex]))} {TRIGGER}{described}"


def _actions(clip: ClipDescription, choose: np.random.Generator) -> list[str]:
    movements = [words for words in (_turning(clip, choose), _nodding(clip, choose), _tilting(clip)) if words]
    expressions = _expression_changes(clip, choose)
    actions = movements + expressions
    if choose.random() < 0.4:
        actions = expressions + movements
    return actions or [_pose(clip, choose)]


def _turning(clip: ClipDescription, choose: np.random.Generator) -> str:
    direction = turn(clip)
    if not direction:
        return ""
    if abs(clip.yaw[1]) < FACING:
        return _one(choose, ("turns {} to face the camera", "turns {} towards the camera")).format(direction)
    return _one(choose, ("turns {}", "turns to the {}", "turns the head to the {}")).format(direction)


def _nodding(clip: ClipDescription, choose: np.random.Generator) -> str:
    direction = nod(clip)
    if not direction:
        return ""
    return _one(choose, {"up": ("raises the head", "lifts the chin"), "down": ("lowers the head",)}[direction])


def _tilting(clip: ClipDescription) -> str:
    return f"tilts the head to the {tilt(clip)}" if tilt(clip) else ""


def _expression_changes(clip: ClipDescription, choose: np.random.Generator) -> list[str]:
    first, last = clip.expressions
    if first == last:
        return [] if first == NEUTRAL else [_one(choose, KEEPS.get(first, (f"keeps a {first}",)))]
    ends = [_one(choose, ENDS[first])] if first != NEUTRAL and (first, last) not in NO_END_BEFORE else []
    begins = [_one(choose, BEGINS[last])] if last != NEUTRAL else []
    return ends + begins


def _pose(clip: ClipDescription, choose: np.random.Generator) -> str:
    """For clips in which nothing happens."""
    yaw = sum(clip.yaw) / 2
    if abs(yaw) < FACING:
        return _one(choose, ("faces the camera", "looks at the camera", *STILL))
    return f"{_one(choose, STILL)}, facing {'right' if yaw > 0 else 'left'}"


def _light(clip: ClipDescription, choose: np.random.Generator) -> str:
    low, high = sorted(clip.light.azimuth)
    if low > SIDE_LIGHT or high < -SIDE_LIGHT:
        return f"lit from the {'right' if low > 0 else 'left'}"
    if clip.light.strength < DIM:
        return _one(choose, ("in dim light", "in soft light"))
    if abs(clip.light.warmth) > WARM:
        return f"in {'warm' if clip.light.warmth > 0 else 'cool'} light"
    return ""


def _one(choose: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(choose.integers(len(options)))]


def _joined(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
