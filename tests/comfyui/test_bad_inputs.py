"""Slices of the bad inputs, and of the load, through a running server: all of it by `python -m tests.campaign.server`
and `.load`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from comfy_server import ComfyServer

from tests.campaign.load import storm
from tests.campaign.server import FINDINGS, pack_cases, run, start

EVERY = 31  # a prime, so that a slice has all nodes and kinds in it


@pytest.fixture(scope="module")
def campaign_server(
    comfyui_path: Path, insightface_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ComfyServer]:
    with start(comfyui_path, tmp_path_factory.mktemp("campaign"), insightface_root) as running:
        yield running


def test_bad_inputs_are_refused_in_words(campaign_server: ComfyServer) -> None:
    every = pack_cases(campaign_server)
    results = run(campaign_server, every[::EVERY])
    assert len(every) > 1000 and len({case.node for case, *_ in results}) > 15
    assert not [(case.name, outcome, text) for case, outcome, text in results if outcome in FINDINGS]
    assert sum(outcome.startswith("refused") for _, outcome, _ in results) > len(results) / 2


def test_too_many_photos_are_refused_before_they_are_converted(campaign_server: ComfyServer) -> None:
    name = "MagicMirrorExtractFaceEmbedding.image_2: connected, 65 pictures"
    ((_, outcome, text),) = run(campaign_server, [c for c in pack_cases(campaign_server) if c.name == name])
    assert outcome == "refused by us" and "67 reference photos were given; use at most 64" in text


def test_half_of_a_character_ends_no_server(campaign_server: ComfyServer) -> None:
    """A log in UTF-8 fails at an error that names it, and with that the thread that runs prompts."""
    name = "MagicMirrorLoader.base_model: connected, surrogate"
    ((_, outcome, text),) = run(campaign_server, [c for c in pack_cases(campaign_server) if c.name == name])
    assert outcome == "refused by us" and "\\ud800" in text


def test_a_late_or_raw_answer_would_be_seen(campaign_server: ComfyServer) -> None:
    """A node that is none of ours fails at a number in its own words."""
    case = next(case for case in pack_cases(campaign_server) if case.what == "connected, nothing")
    case.graph["shown"] = {"class_type": "EmptyImage", "inputs": {"width": ["value", 0], "height": 8, "batch_size": 1}}
    case.graph["shown"]["inputs"]["color"] = 0
    case.graph["end"] = {"class_type": "PreviewImage", "inputs": {"images": ["shown", 0]}}
    ((_, outcome, text),) = run(campaign_server, [case])
    assert outcome == "raw" and "Error" in text


def test_a_short_storm(campaign_server: ComfyServer) -> None:
    result = storm(campaign_server, prompts=12, seed=3)
    assert not result.findings
    assert sum(result.outcomes.values()) == 12
