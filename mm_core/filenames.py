"""filename_prefix: what it stands for, as ComfyUI's page and core's savers read it, and what no file can be called."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

from .errors import SettingError
from .files import numbered_name
from .limits import NAME_LENGTH, NAME_PART_BYTES

Graph = Mapping[str, Any]

_TOKEN = re.compile(r"%([^%]+)%")
_DATE_PART = re.compile(r"dd?|MM?|hh?|mm?|ss?|yyy?y?")
_DATE_PARTS = {"d": "day", "M": "month", "h": "hour", "m": "minute", "s": "second"}
_FORBIDDEN = re.compile(r'[?<>\\:*|"\x00-\x1F\x7F]')
"""In a name on Windows, beside the slash that separates folders."""
_HALF = re.compile(r"[\uD800-\uDFFF]")
"""Of a character that UTF-16 writes in two."""
_RESERVED = re.compile(r"(con|prn|aux|nul|(com|lpt)[0-9¹²³])(\..*)?", re.IGNORECASE)
_ROOM_FOR_NUMBER = 32
_ANY_VALUE = "x"
_MOST_NODES = 10_000


def expand(
    prefix: str,
    *,
    prompt: Graph | None = None,
    workflow: object = None,
    width: int = 0,
    height: int = 0,
    now: datetime | None = None,
) -> str:
    """A prefix with its tokens replaced.

    `%date:yyyy-MM-dd%` and `%Node.widget%` are what ComfyUI's page replaces, for its own savers only; node is the "Node
    name for S&R" of a node's properties, or its title. %width%, %height%, %year%, %month%, %day%, %hour%, %minute% and
    %second% are what its server replaces. What is not found stays as it is; a character that no file name may have
    becomes _ in what replaces a token, and a folder's name that none may have is changed: the clip is made by then.

    Args:
        prompt: the graph in API format; None before it is known: each widget then counts as a short word.
        workflow: the graph as the page stores it; None from an API client.
        width, height: of the pictures, in pixels.

    Raises:
        SettingError: the prefix is longer than any path.
    """
    if len(prefix) > NAME_LENGTH:
        raise SettingError(f"filename_prefix has {len(prefix)} characters; {NAME_LENGTH} are the limit.")
    now = now or datetime.now()
    nodes = list(_nodes(_object(workflow)))

    def replacement(match: re.Match[str]) -> str:
        node, *widget = match[1].split(".")
        if len(widget) != 1:
            return _safe(_date(node[len("date:") :], now)) if node.startswith("date:") else match[0]
        if prompt is None:
            return _ANY_VALUE
        value = _widget(prompt, nodes, node, widget[0])
        return _safe(match[0] if value is None else _as_text(value)).replace("/", "_")

    values = {"width": width, "height": height, "year": now.year}
    values |= {name: f"{getattr(now, name):02}" for name in _DATE_PARTS.values()}
    expanded = _TOKEN.sub(replacement, prefix)
    for name, value in values.items():
        expanded = expanded.replace(f"%{name}%", str(value))
    if expanded == prefix:
        return expanded
    *folders, name = expanded.split("/")
    return "/".join([*map(_tidied, folders), name])


def locate(prefix: str, root: Path, suffix: str) -> tuple[Path, str]:
    """Folder and name that an expanded prefix stands for, below `root`; "anna/" and "" are a folder and no name.

    A name that is too long, as a prompt in it may be, is cut.

    Raises:
        SettingError: it leads out of `root`, or a system that ComfyUI runs on has no files of such a name.
    """
    folder, name = os.path.split(prefix.replace("\\", "/"))
    root = Path(os.path.abspath(root))
    target = Path(os.path.abspath(root / folder))
    name = _cut(name)
    if target.is_relative_to(root):
        for part in (*target.relative_to(root).parts, numbered_name(name, 1, suffix)):
            _check_name(prefix, part)
        if Path(os.path.realpath(target)).is_relative_to(os.path.realpath(root)):
            return target, name
    raise SettingError(
        f"filename_prefix is {prefix!r}, which leads outside the folder {root}; it must name a file within it, such as "
        "people/anna."
    )


def _check_name(prefix: str, part: str) -> None:
    wrong = _FORBIDDEN.search(part)
    if wrong:
        problem = f"holds {wrong[0]!r}, which Windows allows in no file name"
    elif _RESERVED.fullmatch(part):
        problem = f"holds {part!r}, which is the name of a device on Windows"
    elif part.endswith((" ", ".")):
        problem = f"holds the folder {part!r}, and no folder on Windows ends with a space or a dot"
    elif not _is_text(part):
        problem = "holds half of a character, which no file name may"
    elif len(part.encode()) > NAME_PART_BYTES:
        problem = f"holds a folder's name of {len(part.encode())} bytes; {NAME_PART_BYTES} are the limit"
    else:
        return
    raise SettingError(
        f"filename_prefix is {prefix!r}: it {problem}. Use letters, digits, -, _ and spaces, and / for a folder."
    )


def _is_text(part: str) -> bool:
    try:
        part.encode()
    except UnicodeEncodeError:
        return False
    return True


def _cut(name: str) -> str:
    room = NAME_PART_BYTES - _ROOM_FOR_NUMBER
    return name if not _is_text(name) else name.encode()[:room].decode(errors="ignore")


def _safe(text: str) -> str:
    return _HALF.sub("_", _FORBIDDEN.sub("_", text))


def _tidied(folder: str) -> str:
    """A folder's name with words of a graph in it, as `_check_name` wants it."""
    if folder in (os.curdir, os.pardir):
        return folder
    folder = _cut(folder).rstrip(" .")
    return f"{folder}_" if _RESERVED.fullmatch(folder) else folder


def _date(pattern: str, now: datetime) -> str:
    def part(match: re.Match[str]) -> str:
        letters = match[0]
        if letters[0] == "y":
            return {"yy": f"{now.year % 100:02}", "yyyy": str(now.year)}.get(letters, letters)
        return str(getattr(now, _DATE_PARTS[letters[0]])).zfill(len(letters))

    return _DATE_PART.sub(part, pattern)


def _as_text(value: object) -> str:
    """As JavaScript writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)[:NAME_LENGTH]


def _widget(prompt: Graph, nodes: list[tuple[str, Graph]], node: str, widget: str) -> object | None:
    """The value of a widget of the first node of this name in a graph; None where there is none."""
    named = [key for key, known in nodes if _object(known.get("properties")).get("Node name for S&R") == node]
    if not named:
        titles = [(key, known.get("title")) for key, known in nodes]
        titles += [(key, _object(_object(known).get("_meta")).get("title")) for key, known in prompt.items()]
        named = [key for key, title in titles if title == node]
    if not named:  # from an API client, whose graph has no names for replacing but the types that they default to
        named = [key for key, known in prompt.items() if _object(known).get("class_type") == node]
    value = _inputs(prompt, named[0]).get(widget) if named else None
    if isinstance(value, list):  # it comes from another node, which may hold just this value
        value = _inputs(prompt, value[0] if value else None).get("value")
    return None if isinstance(value, list | dict) else value


def _inputs(prompt: Graph, key: object) -> Graph:
    return _object(_object(prompt.get(key) if isinstance(key, str) else None).get("inputs"))


def _nodes(workflow: Graph) -> Iterator[tuple[str, Graph]]:
    """(key in the prompt, node), those of a subgraph before the node that stands for it, as the page collects them."""
    subgraphs = _objects(_object(workflow.get("definitions")).get("subgraphs"))
    definitions = {made["id"]: made for made in subgraphs if isinstance(made.get("id"), str)}

    def below(graph: Graph, path: str, within: tuple[object, ...]) -> Iterator[tuple[str, Graph]]:
        for node in _objects(graph.get("nodes")):
            number, kind = node.get("id"), node.get("type")
            known = isinstance(number, int | str) and len(path) + len(str(number)) < NAME_LENGTH  # bounds the depth too
            key = f"{path}{number}" if known else ""
            if known and isinstance(kind, str) and kind in definitions and kind not in within:
                yield from below(definitions[kind], f"{key}:", (*within, kind))
            yield key, node

    return islice(below(workflow, "", ()), _MOST_NODES)


def _object(value: object) -> Graph:
    """A part of a graph that a client sent, which may be anything."""
    return value if isinstance(value, dict) else {}


def _objects(value: object) -> list[Graph]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []
