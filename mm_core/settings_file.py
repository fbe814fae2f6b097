"""Settings that people write: a dataclass of pydantic, read strictly from YAML, with values of the command line."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from .errors import SettingError, reason
from .limits import CONFIG_BYTES

Settings = TypeVar("Settings")


def load_settings(kind: type[Settings], path: Path | None, overrides: Mapping[str, str] | None = None) -> Settings:
    """Read a YAML file; without a path, the defaults.

    kind: a dataclass of pydantic, strict.
    overrides: values by dotted name, `{"video.loop.steps": "100"}`, as on the command line.

    Raises SettingError for a missing file, an unknown or missing name, or a value of another type or out of its range.
    """
    content: Any = {}
    try:
        if path is not None:
            if path.stat().st_size > CONFIG_BYTES:
                raise SettingError(f"The config {path} has more than {CONFIG_BYTES:,} bytes, which no config has.")
            content = _parse(path.read_text(encoding="utf-8"), f"The config {path}")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError(f"The config {path} cannot be read: {reason(error)}. Give a YAML file.") from error
    for name, text in (overrides or {}).items():
        *parents, last = name.split(".")
        place = content
        for parent in parents:
            place = place.setdefault(parent, {}) if isinstance(place, dict) else None
        if not isinstance(place, dict):
            raise SettingError(f"{name} cannot be set: {'.'.join(parents)} is not a group of settings.")
        place[last] = _parse(text, f"The value of {name}")
    where = "--set" if path is None else path.name
    try:
        # As JSON, whose lists may be tuples and whose groups dataclasses; nothing else is converted.
        return TypeAdapter(kind).validate_json(json.dumps(content, default=str))
    except ValidationError as error:
        raise SettingError(f"{where}: {'; '.join(_told(kind, error))}.") from error
    except (TypeError, ValueError, RecursionError) as error:
        raise SettingError(f"{where} is no group of settings with names: {error}.") from error


def parse_setting(text: str) -> tuple[str, str]:
    """Name and value of NAME=VALUE. Raises SettingError."""
    name, equals, value = text.partition("=")
    if not equals:
        raise SettingError(f"--set {text} has no value: write --set {text}=VALUE.")
    return name, value


def _told(kind: type, error: ValidationError) -> Iterator[str]:
    """Each mistake with the setting's name, its value and what it must be; names alone where those are the mistake."""
    found = error.errors(include_url=False)
    for what, mistake in (("unknown", "unexpected_keyword_argument"), ("missing", "missing")):
        names = sorted((each["loc"] for each in found if each["type"] == mistake), key=str)
        if names:
            yield f"{what} {', '.join('.'.join(map(str, name)) for name in names)}"
    for each in found:
        if each["type"] not in ("unexpected_keyword_argument", "missing"):
            message, name = each["msg"].removeprefix("Value error, "), ".".join(map(str, each["loc"]))
            if each["type"] == "value_error":
                yield message
            else:
                yield f"{name or 'it'} is {str(each['input'])[:100]!r}; {message.replace('Input should', 'it must')}"
    for each in found:
        if each["type"] == "unexpected_keyword_argument":
            fields = dataclasses.fields(_group(kind, each["loc"][:-1]))
            yield f"the settings there are {', '.join(field.name for field in fields)}"
            break


def _group(kind: Any, names: tuple[int | str, ...]) -> Any:
    """The dataclass of the settings below these names."""
    for name in names:
        kind = get_type_hints(kind)[str(name)]
        kind = next(each for each in (kind, *get_args(kind)) if dataclasses.is_dataclass(each))
    return kind


class _Loader(yaml.SafeLoader):
    """YAML 1.2's `no` and 1e-5, a text and a number, and no aliases, of which a few lines unpack to gigabytes."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if first not in "yYnNoO" or not tag.endswith(":bool")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it uses an alias (*), which is not taken; write the value out")
        return super().compose_node(parent, index)


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789"))


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError as error:
        raise SettingError(f"{where} cannot be read: it is nested too deeply.") from error
    except (yaml.YAMLError, ValueError) as error:
        raise SettingError(f"{where} cannot be read: {error}.") from error
