"""Translations and help pages against the schemas that a ComfyUI holds, and as it serves them."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from comfy_server import ComfyServer

ROOT = Path(__file__).resolve().parents[2]
LANGUAGES = sorted(folder.name for folder in (ROOT / "locales").iterdir())
HELP = ROOT / "web" / "docs"
NODES = sorted(page.stem for page in HELP.glob("*.md"))


def texts(language: str) -> dict[str, Any]:
    return json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))


def described(name: str, tooltip: str | None) -> dict[str, str]:
    return {"name": name} if tooltip is None else {"name": name, "tooltip": tooltip}


def as_locale(info: dict[str, Any]) -> dict[str, Any]:
    """A node of /object_info in the form of nodeDefs.json. Inputs show under the names that workflows store."""
    inputs = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
    outputs = enumerate(zip(info["output_name"], info["output_tooltips"], strict=True))
    return {
        "display_name": info["display_name"],
        "description": info["description"],
        "inputs": {name: described(name, options.get("tooltip")) for name, (_, options) in inputs.items()},
        "outputs": {str(index): described(name, tooltip) for index, (name, tooltip) in outputs},
    }


def read(server: ComfyServer, path: str) -> str:
    with urllib.request.urlopen(server.address + path) as answer:
        return answer.read().decode("utf-8")


def help_address(server: ComfyServer, page: str) -> str:
    """Where ComfyUI's page looks for help: it makes the folder from the node's Python module."""
    module = server.object_info("MagicMirrorLoader")["python_module"]
    kind, pack = module.split(".")
    assert kind == "custom_nodes"
    return f"/extensions/{quote(pack)}/docs/{page}"


def nodes_of(server: ComfyServer) -> dict[str, Any]:
    return {name: info for name, info in server.object_info().items() if name.startswith("MagicMirror")}


def test_english_is_what_the_schemas_say(any_server: ComfyServer) -> None:
    """Word for word: the page shows the English file in place of the schema."""
    english = texts("en")
    for name, info in nodes_of(any_server).items():
        assert english.get(name) == as_locale(info)


def test_english_has_no_other_nodes(server: ComfyServer) -> None:
    assert texts("en").keys() == nodes_of(server).keys()


def test_the_server_hands_out_the_translations(any_server: ComfyServer) -> None:
    served = json.loads(read(any_server, "/i18n"))
    for language in LANGUAGES:
        expected = texts(language)
        assert {name: served[language]["nodeDefs"][name] for name in expected} == expected


@pytest.mark.parametrize("node", NODES)
def test_the_server_hands_out_the_help(any_server: ComfyServer, node: str) -> None:
    page = (HELP / f"{node}.md").read_text(encoding="utf-8")
    assert read(any_server, help_address(any_server, f"{node}.md")) == page
    for translated in (HELP / node).glob("*.md"):
        address = help_address(any_server, f"{node}/{translated.name}")
        assert read(any_server, address) == translated.read_text(encoding="utf-8")


def test_help_that_is_not_translated_is_not_found(any_server: ComfyServer) -> None:
    """The page then asks for the English one."""
    with pytest.raises(urllib.error.HTTPError) as raised:
        read(any_server, help_address(any_server, "MagicMirrorLoader/xx.md"))
    assert raised.value.code == 404


def test_one_script(any_server: ComfyServer) -> None:
    """What the page runs of the web folder is what draws a node's text; the rest are help pages."""
    pack = help_address(any_server, "").removesuffix("docs/")
    scripts = [path for path in json.loads(read(any_server, "/extensions")) if path.startswith(pack)]
    assert scripts == [f"{pack}said.js"]
