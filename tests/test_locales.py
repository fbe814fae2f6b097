"""The nodes' translations and help pages: complete, and what the page makes of them. The schemas themselves need a
ComfyUI: tests/comfyui/test_locales.py."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from string import Formatter
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
HELP = ROOT / "web" / "docs"
PAGES = sorted(HELP.glob("**/*.md"))
LANGUAGES = sorted(folder.name for folder in (ROOT / "locales").iterdir())
# vue-i18n, which ComfyUI's page translates with, gives these a meaning: interpolation, links, plurals.
SPECIAL = set("{}@|")
# A choice that a colon explains, a folder, a file, an address, the word that marks the person.
UNTRANSLATED = re.compile(r'^[a-z]+(?=:)|(?<=\. )[a-z]+(?=:)|models/\w+|[\w-]*\.(?:bin|safetensors|com|co)\b|"img"')
# Sockets that only connect; a help page says nothing on them beyond its example.
UNSAID = {
    "MagicMirrorExtractFaceEmbedding": {"model"},
    "MagicMirrorApplyCANAdapter": {"model", "identity"},
    "MagicMirrorCogVideoXSampler": {"model"},
    "MagicMirrorVideoCombine": {"images"},
    "MagicMirrorScoreIdentity": {"model", "identity"},
    "MagicMirrorScaleFactors": {"identity"},
    "MagicMirrorPromptHelper": {"model"},
    "MagicMirrorSaveIdentity": {"identity"},
    "MagicMirrorLoadIdentity": {"model"},
    "MagicMirrorApplyNative": {"magic_mirror", "identity"},
    "MagicMirrorEncodePrompt": {"magic_mirror"},
    "MagicMirrorNativeSampling": {"model"},
    "MagicMirrorNativeLatent": {"magic_mirror"},
}


def texts(language: str) -> dict[str, Any]:
    return json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))


def leaves(tree: dict[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    """(dotted path, text) of everything that is shown."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{path}{key}.")
        else:
            yield path + key, value


def page_name(page: Path) -> str:
    return page.relative_to(HELP).as_posix()


def node_of(page: Path) -> str:
    """docs/<node>.md is English, docs/<node>/<language>.md a translation."""
    return page.stem if page.parent == HELP else page.parent.name


def column(page: Path, table: int) -> list[str]:
    """The first column of a page's table, without its head."""
    tables = re.findall(r"(?:^\|.*\n)+", page.read_text(encoding="utf-8"), re.MULTILINE)
    return [row.split("|")[1].strip() for row in tables[table].splitlines()[2:]]


@cache
def strings_of_the_code() -> list[str]:
    """Every literal text of the pack, those between an f-string's values too."""
    trees = (ast.parse(file.read_text(encoding="utf-8")) for part in ("nodes", "mm_core") for file in files(part))
    nodes = (node for tree in trees for node in ast.walk(tree))
    return [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]


def files(part: str) -> list[Path]:
    return sorted((ROOT / part).rglob("*.py"))


def test_the_languages() -> None:
    assert LANGUAGES == ["ar", "en", "es", "fr", "ja", "ko", "ru", "zh", "zh-TW"]


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_language_has_every_text(language: str) -> None:
    assert [path for path, _ in leaves(texts(language))] == [path for path, _ in leaves(texts("en"))]


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_page_shows_texts_as_they_are_written(language: str) -> None:
    shown = dict(leaves(texts(language)))
    assert not [path for path, text in shown.items() if text != text.strip() or not text or SPECIAL & set(text)]


@pytest.mark.parametrize("language", LANGUAGES)
def test_choices_and_files_are_not_translated(language: str) -> None:
    shown = dict(leaves(texts(language)))
    for path, english in leaves(texts("en")):
        assert [name for name in UNTRANSLATED.findall(english) if name not in shown[path]] == [], path


def errors(language: str) -> dict[str, str]:
    """The texts of errors, with fields in braces."""
    content = json.loads((ROOT / "locales" / language / "main.json").read_text(encoding="utf-8"))
    return content["magicMirror"]["errors"]


def fields(text: str) -> set[str]:
    return {field for _, field, _, _ in Formatter().parse(text) if field is not None}


def keyed_errors() -> Iterator[tuple[str, str, set[str | None]]]:
    """(key, English text, names of the values) of every error that the code makes with a key; None stands for `**`."""
    for file in [*files("nodes"), *files("mm_core")]:
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            values = {word.arg: word.value for word in call.keywords} if isinstance(call, ast.Call) else {}
            if "key" not in values or not ast.unparse(call.func).endswith("Error"):
                continue
            text = call.args[0]
            if isinstance(text, ast.Name):
                module = import_module(".".join(file.relative_to(ROOT).with_suffix("").parts))
                english = getattr(module, text.id)
            else:
                english = ast.literal_eval(text)
            yield ast.literal_eval(values.pop("key")), english, set(values)


def test_english_errors_are_those_of_the_code() -> None:
    found = list(keyed_errors())
    assert {(key, text) for key, text, _ in found} == set(errors("en").items())
    for key, text, values in found:
        assert fields(text) == values or (None in values and fields(text) >= values - {None}), key


@pytest.mark.parametrize("language", LANGUAGES)
def test_errors_have_the_same_fields_in_every_language(language: str) -> None:
    english, translations = errors("en"), errors(language)
    assert list(translations) == list(english)
    for key, text in translations.items():
        assert fields(text) == fields(english[key]), key
        assert language == "en" or text != english[key]


def test_every_node_has_a_help_page() -> None:
    assert {page.stem for page in HELP.glob("*.md")} == texts("en").keys()


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_help_speaks_of_inputs_that_exist(page: Path) -> None:
    """The first column of the table of inputs, and translations lie beside the page that they are of."""
    node = node_of(page)
    named = {name for cell in column(page, 0) for name in re.findall(r"`(\w+)`", cell)}
    assert named == texts("en")[node]["inputs"].keys() - UNSAID.get(node, set())


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_help_quotes_real_messages(page: Path) -> None:
    """`...` stands for what a message fills in."""
    quoted = [message.strip("`") for message in column(page, 1)]
    assert quoted
    for message in quoted:
        for part in filter(None, (part.strip() for part in message.split("..."))):
            assert any(part in text for text in strings_of_the_code()), (message, part)
