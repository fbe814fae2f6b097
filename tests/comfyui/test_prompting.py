"""The Prompt Helper on a real ComfyUI."""

from __future__ import annotations

from typing import Any

import pytest
from comfy_server import ComfyServer, ExecutionFailed

HELPER, LOADER, APPLY = "MagicMirrorPromptHelper", "MagicMirrorLoader", "MagicMirrorApplyCANAdapter"
PROMPT = "A man img smiles at the camera."


def ask(server: ComfyServer, graph: Any, model: str, prompt: str) -> str:
    """The report, with which the prompt comes out as it went in."""
    for unused in ("MagicMirrorCogVideoXSampler", "MagicMirrorVideoCombine"):
        del graph[graph.id(unused)]
    graph.add("30", HELPER, model=[graph.id(model), 0], prompt=prompt)
    graph.add("31", "PreviewAny", source=["30", 0])
    graph.add("32", "PreviewAny", source=["30", 1])
    outputs = server.run(graph)["outputs"]
    assert outputs["31"]["text"] == [prompt]
    assert outputs["32"]["text"] == outputs["30"]["text"]
    return outputs["30"]["text"][0]


def test_which_tokens_the_identity_takes(any_server: ComfyServer, any_graph: Any) -> None:
    assert ask(any_server, any_graph, LOADER, PROMPT).splitlines() == [
        "9 of 48 tokens, with the end mark.",
        'The person: "man" (▁man); the identity takes tokens 2 and 3.',
        "Nothing is cut off.",
        "▁A ▁man ▁man ▁smiles ▁at ▁the ▁camera .",
    ]


def test_what_is_cut_off(server: ComfyServer, graph: Any) -> None:
    """4 tokens and 60 more; 47 fit."""
    report = ask(server, graph, LOADER, "A man img smiles" + " and smiles" * 30)
    assert "48 of 48 tokens" in report and "CUT OFF, 17 tokens: smiles and smiles" in report
    assert "[WARNING] MagicMirror: 48 of 48 tokens" in server.log_text()


def test_an_identity_that_is_off(server: ComfyServer, graph: Any) -> None:
    graph.inputs(APPLY)["id_branch"] = False
    report = ask(server, graph, APPLY, PROMPT)
    assert "No word takes an identity" in report and report.endswith("▁A ▁man ▁smiles ▁at ▁the ▁camera .")


def test_a_prompt_without_a_person(server: ComfyServer, graph: Any) -> None:
    with pytest.raises(ExecutionFailed, match="names no person"):
        ask(server, graph, LOADER, "A castle on a hill.")
