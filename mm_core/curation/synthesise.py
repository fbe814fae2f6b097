"""Pairs of pictures (the paper's source C): for each portrait other pictures of its person, by a generator.

A pair is whole or not there, and the same by whatever process it is made; who is killed goes on with the same call.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from ..data.manifest import MANIFEST, PICTURES, read_manifest
from ..errors import MagicMirrorError, NoFaceError, PromptError, SettingError
from ..files import write_bytes, write_json
from ..names import is_below
from ..picture_file import decode_image
from ..pipelines.prompt import mark_identity
from .items import REFERENCE, Item, shards_of
from .measure import content_id
from .prompts import Prompts
from .write import jpeg

NOTE = "synthesis.json"
"""What the pairs of a folder are made with."""
_PERSON = "person"


class Generator(Protocol):
    """What makes pictures of a person: `photomaker.PhotoMaker`, or anything that has this method."""

    def picture(self, portraits: Sequence[np.ndarray], prompt: str, seed: int) -> np.ndarray:
        """(H, W, 3) uint8 RGB. portraits: (H, W, 3) uint8 RGB of one person. prompt: with `img` after their word.

        Raises NoFaceError for portraits that show no face.
        """


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What pairs are made of, besides the portraits."""

    prompts: Prompts
    each: int
    """Pictures of each person, 1 or more."""
    seed: int
    generator: str
    """Its name, for the pairs' source."""


def portraits_of(inputs: Sequence[Path]) -> Iterator[Item]:
    """The pictures of data sets, such as `portraits` makes, and of folders, tar and parquet files, in order.

    Raises SettingError for an input that holds none.
    """
    for path in inputs:
        if (path / MANIFEST).is_file():
            for sample in read_manifest(path):
                said = {what: getattr(sample, what) for what in ("caption", "source", "licence")}
                yield Item(name=sample.id, suffix=Path(sample.media).suffix, content=path / sample.media, info=said)
        else:
            for shard in shards_of(path, PICTURES):
                for item in shard.items():
                    item.info |= {what: item.said(what) or getattr(shard, what) for what in ("source", "licence")}
                    yield item


def synthesise(
    inputs: Sequence[Path],
    out: Path,
    load: Callable[[], Generator],
    origin: Origin,
    *,
    rank: int = 0,
    world_size: int = 1,
    on_picture: Callable[[int], None] = lambda made: None,
) -> tuple[int, dict[str, str]]:
    """Write this process's share of the pairs into a folder, as `pairs` reads them.

    load: reads the generator's weights, if there is something to make. on_picture: is told how many are there.

    Returns how many pairs of the share are there, and why portraits were left out, by name.

    Raises SettingError for fewer pictures than one, and for inputs that hold nothing, or the output.
    """
    if origin.each < 1:
        raise SettingError(f"{origin.each} pictures of each person were asked for; it must be 1 or more.")
    for path in inputs:
        if is_below(out, path):
            raise SettingError(f"{out} lies in the input {path}, where it would be looked at; choose another --out.")
    generator: Generator | None = None
    there, left_out = 0, {}
    for number, item in enumerate(portraits_of(inputs)):
        if number % world_size != rank:
            continue
        try:
            content = item.read()
            portrait = decode_image(io.BytesIO(content), item.name)
        except MagicMirrorError as error:
            left_out[item.name] = str(error)
            continue
        try:
            for picture in range(origin.each):
                stem = out / f"{content_id(content)}-{picture}"
                if not stem.with_suffix(".jpg").is_file():
                    generator = generator or load()
                    _make(generator, item, content, portrait, stem, origin)
                there += 1
                on_picture(there)
        except NoFaceError as error:
            left_out[item.name] = str(error)
    return there, left_out


def _make(generator: Generator, item: Item, content: bytes, portrait: np.ndarray, stem: Path, origin: Origin) -> None:
    """Write a pair, the picture last: where it is, all is."""
    drawn = hashlib.sha256(f"{origin.seed} {stem.name}".encode()).digest()
    prompt = origin.prompts.prompt(int.from_bytes(drawn[:8], "big"), _word(item))
    made = generator.picture([portrait], prompt, int.from_bytes(drawn[8:15], "big"))
    write_bytes(stem.with_name(f"{stem.name}{REFERENCE}{item.suffix}"), content)
    source = f"{origin.generator}, from {item.said('source') or 'a portrait'}"
    write_json(stem.with_suffix(".json"), {"caption": prompt, "source": source, "licence": item.said("licence")})
    write_bytes(stem.with_suffix(".jpg"), jpeg(Image.fromarray(made)))


def _word(item: Item) -> str:
    """What a portrait's caption calls its person."""
    try:
        return mark_identity(item.said("caption") or "").noun.lower()
    except PromptError:
        return _PERSON
