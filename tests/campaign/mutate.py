"""Damage to files: bytes, words of texts, values of JSON, and the headers that formats have. The same seed gives the
same damage."""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Iterator
from typing import Any

_WORDS = [
    b"NaN", b"Infinity", b"-1", b"0", b"1e999", b"18446744073709551616", b"4611686018427387904", b"true", b"null",
    b'""', b"[]", b"{}", b"[" * 3000, b'{"a":' * 2000, b'"../../secret"', b'"/etc/passwd"', b'"\\ud800"', b'"\\u0000"',
    b'["os", "system"]', b"&a [*a]", b"!!python/object/apply:os.system [id]", b"99999999", b'"F64"', b'"BOOL"',
    b"\xff\xfe", b"img", b" " * 5000, b"#99", b"@99", b"(x:1.2)", "\u2028é".encode(),
]  # fmt: skip
_VALUES: list[Any] = [
    None, True, -1, 0, 1.5, 1e308, float("nan"), float("inf"), 2**63, 2**70, "", "../../secret", "/etc/passwd", "7",
    "\ud800", "\0", "x" * 100_000, [], {}, [[]], ["os", "system"], [0] * 1000, ["%a.b%", 0], {"a": {}}, "float16",
]  # fmt: skip
_TOKEN = re.compile(rb'"[^"]{0,200}"|-?[0-9][0-9.e+-]*|true|false|null|[\[\]{},:]|\w+')


def damaged(content: bytes, seed: str, mutations: int) -> bytes:
    """The content after so many changes."""
    random_ = random.Random(seed)
    for _ in range(mutations):
        content = _changed(content, random_)
    return content


def _changed(content: bytes, random_: random.Random) -> bytes:
    length = int.from_bytes(content[:8], "little")
    if 2 <= length < min(len(content), 2**22) and content[8:9] == b"{" and random_.random() < 0.8:  # safetensors
        header = _text(content[8 : 8 + length], random_)
        return len(header).to_bytes(8, "little") + header + content[8 + length :]
    is_text = b"\0" not in content[:2000]
    return (_text if is_text and random_.random() < 0.75 else _bytes)(content, random_)


def _text(content: bytes, random_: random.Random) -> bytes:
    """Damage to JSON mostly leaves JSON: what is none is refused at once."""
    if random_.random() < 0.8:
        try:
            tree = json.loads(content)
        except (ValueError, RecursionError):
            tree = None
        if places := list(_places(tree)):
            holder, key = random_.choice(places)
            _change(holder, key, places, random_)
            return json.dumps(tree).encode()
    return _word(content, random_)


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every object or array of a JSON value, with each of its keys or numbers."""
    waiting = [tree]
    while waiting:
        holder = waiting.pop()
        if isinstance(holder, dict | list):
            for key in list(holder) if isinstance(holder, dict) else range(len(holder)):
                yield holder, key
                waiting.append(holder[key])


def _change(holder: Any, key: Any, places: list[tuple[Any, Any]], random_: random.Random) -> None:
    """A value becomes another, that of another place, goes, or is one of many; or its key changes."""
    act, (other, place) = random_.randrange(6), random_.choice(places)
    if act == 0:
        del holder[key]
    elif act == 1:
        holder[key] = copy.deepcopy(other[place])
    elif act == 2 and isinstance(holder, dict):
        holder[str(random_.choice(_VALUES))[:50]] = holder.pop(key)
    elif act == 3:
        holder[key] = [copy.deepcopy(holder[key])] * 50
    else:
        holder[key] = copy.deepcopy(random_.choice(_VALUES))


def _word(content: bytes, random_: random.Random) -> bytes:
    """A token of a text becomes another, goes, or comes twice."""
    tokens = list(_TOKEN.finditer(content))
    if not tokens:
        return _bytes(content, random_)
    token = random_.choice(tokens)
    new = random_.choice([random_.choice(_WORDS), b"", token[0] * 2, random_.choice(tokens)[0]])
    return content[: token.start()] + new + content[token.end() :]


def _bytes(content: bytes, random_: random.Random) -> bytes:
    start = random_.randrange(len(content) + 1)
    if random_.random() < 0.5:  # headers stand at the beginning
        start = random_.randrange(min(len(content), 512) + 1)
    end = min(len(content), start + random_.choice([1, 1, 2, 4, 8, 64, 1024]))
    piece = content[start:end]
    new = random_.choice(
        [
            random_.randbytes(len(piece)), b"", piece * 2, b"\xff" * len(piece), b"\0" * len(piece),
            bytes(reversed(piece)),
            bytes(byte ^ 1 << random_.randrange(8) for byte in piece), random_.choice(_WORDS),
        ]
    )  # fmt: skip
    cut = random_.random() < 0.1
    return content[:start] if cut else content[:start] + new + content[end:]
