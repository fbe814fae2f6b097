"""The people and prompts of a benchmark as a folder: 50 people in 7 classes, 1 to 4 photos and 4 prompts each (A.2).

The layout is that of the IPVG challenge's test set, `<person>/*.png` and `<person>/prompt1.txt`, which is read as well.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import MagicMirrorError, NoFaceError, SettingError
from ..faces.analysis import FaceAnalyzer
from ..faces.references import MIN_SAME_PERSON
from ..files import atomic_folder, write_json
from ..json_file import read_object
from .people import PHOTOS, Person, load_person

CLASSES = {  # and whose prompts they take
    "man": "adult", "woman": "adult", "elderly man": "adult", "elderly woman": "adult", "boy": "child", "girl": "child",
    "baby": "baby",
}  # fmt: skip
PEOPLE, PHOTOS_EACH, PROMPTS_EACH = 50, 4, 4
INDEX = "benchmark.json"
_PROMPTS = Path(__file__).with_name("prompts.json")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A clip to make. name: of its file, without ending. kind: one of CLASSES, "" where it is not known. prompt: may
    have our trigger, which others are not told."""

    name: str
    person: str
    kind: str
    photos: tuple[Path, ...]
    prompt: str


def build_set(analyzer: FaceAnalyzer, people: Path, out: Path, number: int = PEOPLE) -> list[Entry]:
    """Make a benchmark of `<class>/<person>/*.jpg` in the folder `people`, and return its clips.

    Raises MagicMirrorError for a folder `out` that is there, and, with all that is wrong, for other classes, a class
    without people, another number of people than `number`, or of photos than 1 to 4, photos without a face, or of two
    people.
    """
    if out.exists():
        raise MagicMirrorError(f"{out} is there already: give another folder, or remove it")
    found = [(kind, person) for kind in _folders(people) for person in _folders(kind)]
    faults = list(_faults(analyzer, found, number))
    if faults:
        raise MagicMirrorError(f"No benchmark was made of {people}. Mend this and try again:\n" + "\n".join(faults))
    templates, taken = read_object(_PROMPTS), dict.fromkeys(CLASSES.values(), 0)
    with atomic_folder(out) as temporary:
        for folder, person in found:
            kind, own = _kind(folder), temporary / person.name
            own.mkdir()
            for photo in _photos(person):
                shutil.copyfile(photo, own / photo.name)
            group = CLASSES[kind]
            for index in range(PROMPTS_EACH):
                template = templates[group][taken[group] % len(templates[group])]
                text = template.format(A=f"An {kind}" if kind.startswith("e") else f"A {kind}")
                (own / f"prompt{index + 1}.txt").write_text(f"{text}\n", encoding="utf-8")
                taken[group] += 1
        write_json(temporary / INDEX, {person.name: _kind(folder) for folder, person in found})
    return read_set(out)


def read_set(folder: Path) -> list[Entry]:
    """The clips of a benchmark, by name. Raises MagicMirrorError for a folder that holds none, or an empty prompt."""
    kinds = read_object(folder / INDEX) if (folder / INDEX).is_file() else {}
    entries = []
    for person in _folders(folder):
        photos = _photos(person)
        prompts = sorted(person.glob("prompt*.txt"), key=lambda path: (len(path.name), path.name))
        for path in prompts if photos else ():
            prompt = path.read_text(encoding="utf-8").strip()
            if not prompt:
                raise MagicMirrorError(f"{path} is empty: write the prompt into it")
            kind = str(kinds.get(person.name, ""))
            name = f"{person.name}_{path.stem}"
            entries.append(Entry(name=name, person=person.name, kind=kind, photos=photos, prompt=prompt))
    if not entries:
        raise MagicMirrorError(
            f"{folder} holds no benchmark: it must hold <person>/*.png and <person>/prompt1.txt, as `set` makes them"
        )
    return entries


def _faults(analyzer: FaceAnalyzer, found: list[tuple[Path, Path]], number: int) -> Iterator[str]:
    """All that is wrong with the people, a line each."""
    if number < 1:
        raise SettingError(f"number is {number}; it must be 1 or more")
    if len(found) != number:
        yield f"{len(found)} people are there, {number} are wanted: add or remove some, or set number to {len(found)}"
    kinds = {_kind(folder) for folder, _ in found}
    missing = [kind for kind in CLASSES if kind not in kinds]
    if missing and number >= len(CLASSES):
        yield f"nobody is in {', '.join(missing)}: add people there"
    names: set[str] = set()
    for folder, person in found:
        photos = _photos(person)
        if _kind(folder) not in CLASSES:
            yield f"{folder} is no class: name it {', '.join(CLASSES)}"
        elif not re.fullmatch(r"[\w-]+", person.name) or person.name in names:
            yield f"{person}: a person's name is of letters, digits, - and _, and stands once: rename the folder"
        elif not 1 <= len(photos) <= PHOTOS_EACH:
            yield f"{person} holds {len(photos)} photos: leave 1 to {PHOTOS_EACH}"
        else:
            yield from _of_photos(analyzer, person.name, photos)
        names.add(person.name)


def _of_photos(analyzer: FaceAnalyzer, name: str, photos: tuple[Path, ...]) -> Iterator[str]:
    try:
        seen: Person = load_person(analyzer, name, list(photos))
    except (MagicMirrorError, NoFaceError) as error:
        yield str(error)
        return
    directions = seen.embeddings / np.linalg.norm(seen.embeddings, axis=1, keepdims=True)
    for photo, direction in zip(photos[1:], directions[1:]):
        if (cosine := float(direction @ directions[0])) < MIN_SAME_PERSON:
            yield f"{photo} shows another person than {photos[0].name} (cosine {cosine:.2f}): take one out"


def _folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise MagicMirrorError(f"the folder {folder} does not exist: make it, or give another one")
    return sorted(path for path in folder.iterdir() if path.is_dir())


def _photos(folder: Path) -> tuple[Path, ...]:
    return tuple(sorted(path for path in folder.iterdir() if path.suffix.lower() in PHOTOS))


def _kind(folder: Path) -> str:
    return folder.name.replace("_", " ")
