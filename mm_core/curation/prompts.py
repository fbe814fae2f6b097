"""Prompts for pictures of one person: sentences of three parts, 28,800 of them, so that few pairs share one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ..errors import SettingError
from ..pipelines.prompt import TRIGGER

PERSON = "{person}"

_DOES = """
cracking nuts at a kitchen table|watering tomatoes in a small greenhouse|waiting on a railway platform|
leaning on the railing of a ferry|kneading dough in a bakery|tuning an old violin|carrying firewood through snow|
standing at a bus stop in the rain|choosing apples at a market stall|repairing a bicycle in a shed|
looking out of a train window|sitting on the steps of a town hall|painting a wooden fence|drinking tea on a balcony|
walking along a pier at low tide|arranging flowers at a desk|resting on a bench under a chestnut tree|
playing chess in a park|sorting seashells on a beach|climbing a dry stone wall|hanging laundry on a roof|
sweeping leaves in a courtyard|listening to a record player|sharpening pencils in a studio|
standing in a field of barley|rowing a small boat on a lake|looking up at the dome of a station|
packing a suitcase on a bed|crossing a footbridge in the hills|stirring soup over a camping stove|
shaping a bowl at a potter's wheel|standing in a lift with mirrors|trying on hats in a shop|
feeding hens behind a barn|sitting in an empty theatre|buying bread at a counter|
folding paper cranes by a window|cutting roses in a garden|warming hands at a bonfire|winding up a clock
"""
_WEARS = """
in a grey wool sweater|in a denim jacket|in a white linen shirt|in a yellow raincoat|in a dark green parka|
in a striped T-shirt|in a navy blue suit|in a red checked shirt|in a knitted cardigan|in a black turtleneck|
in a brown leather jacket|in a light blue blouse|in a beige trench coat|in a cream jumper|in work overalls|
in a purple hoodie|in a corduroy blazer|in an orange fleece|in a plain white T-shirt|in a tweed jacket|
in a quilted vest|in a dark red pullover|in a flowered shirt|in a padded winter coat|in a grey sweatshirt|
in a silk shirt|in an apron over a shirt|in a sailor's jersey|in an olive field jacket|in a mustard sweater
"""
_SEEN = """
soft morning light, 50 mm photograph|late afternoon sun from the side|overcast sky, even light|
warm lamp light, shallow depth of field|blue hour, street lamps behind|window light from the left, close-up|
bright noon, sharp shadows|light fog, muted colours|golden hour, backlit hair|candid photograph, film grain|
cool shade, natural skin|portrait lens, blurred background|three-quarter view, upper body|
seen from slightly below, head and shoulders|seen from slightly above, upper body|
side light, dark background|after rain, wet ground|snow light, pale colours|warm evening, lens flare|
documentary photograph, wide shot of the upper body|medium close-up, looking past the camera|
medium close-up, looking into the camera|smiling, natural colours|serious, high detail
"""


def _parts(text: str) -> list[str]:
    return re.sub(r"\|\n", "|", text.strip()).split("|")


class Prompts:
    """Sentences in which PERSON stands for the person. own: instead of those here."""

    def __init__(self, own: Sequence[str] = ()) -> None:
        self._lists = [own] if own else [_parts(text) for text in (_DOES, _WEARS, _SEEN)]

    def __len__(self) -> int:
        count = 1
        for parts in self._lists:
            count *= len(parts)
        return count

    def prompt(self, number: int, word: str) -> str:
        """The one of this number, from 0, over and over; word: what the person is called."""
        chosen = []
        for parts in self._lists:
            number, place = divmod(number, len(parts))
            chosen.append(parts[place])
        sentence = chosen[0] if len(chosen) == 1 else f"A {PERSON} {', '.join(chosen)}."
        return sentence.replace(PERSON, f"{word} {TRIGGER}")


def read_prompts(path: Path | None) -> Prompts:
    """One a line. Raises SettingError for a file without any, or a line without PERSON."""
    if path is None:
        return Prompts()
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError(f"{path} cannot be read: {error}. Give a text file with a prompt on each line.") from error
    for number, line in enumerate(lines, 1):
        if line and line.count(PERSON) != 1:
            raise SettingError(f"{path}, line {number}: {line[:100]!r} must have {PERSON} once, for the person's word.")
    own = [line for line in lines if line]
    if not own:
        raise SettingError(f"{path} holds no prompt; write one on each line, with {PERSON} for the person's word.")
    return Prompts(own)
