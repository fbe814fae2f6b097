"""A custom node for ComfyUI that hands bad values to other nodes: what other packs, and failed nodes, may give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def _pictures(*shape: int, value: float = 0.5) -> Callable[[], torch.Tensor]:
    return lambda: torch.full(shape, value)


def _sound(*shape: int, value: float = 0.0, rate: Any = 16000) -> Callable[[], dict[str, Any]]:
    return lambda: {"waveform": torch.full(shape, value), "sample_rate": rate}


def _latent(*shape: int, value: float = 0.0) -> Callable[[], dict[str, Any]]:
    return lambda: {"samples": torch.full(shape, value)}


_NAN, _INF = float("nan"), float("inf")

ANYTHING: dict[str, Callable[[], Any]] = {
    "nothing": lambda: None,
    "a text": lambda: "text",
    "a number": lambda: 7,
    "a dict": dict,
}
WIDGETS: dict[str, dict[str, Callable[[], Any]]] = {
    "INT": {
        "-1": lambda: -1, "-2**40": lambda: -(2**40), "2**70": lambda: 2**70, "NaN": lambda: _NAN, "2.5": lambda: 2.5,
        "nothing": lambda: None, "a text": lambda: "text",
    },
    "FLOAT": {
        "NaN": lambda: _NAN, "inf": lambda: _INF, "-inf": lambda: -_INF, "-1e9": lambda: -1e9, "1e9": lambda: 1e9,
        "nothing": lambda: None, "a text": lambda: "text",
    },
    "STRING": {
        "surrogate": lambda: "a man img \ud800", "NUL": lambda: "a man img \0", "nothing": lambda: None,
        "a number": lambda: 7, "500,000 letters": lambda: "a man img " * 50_000, "../../x": lambda: "../../x",
    },
    "COMBO": {
        "gone": lambda: "gone", "empty": lambda: "", "nothing": lambda: None, "a number": lambda: 7,
        "surrogate": lambda: "\ud800", "/etc/passwd": lambda: "/etc/passwd",
    },
    "BOOLEAN": {"nothing": lambda: None, "a text": lambda: "maybe"},
}  # fmt: skip
SOCKETS: dict[str, dict[str, Callable[[], Any]]] = {
    "IMAGE": {
        "no picture": _pictures(0, 64, 64, 3), "no pixel": _pictures(1, 0, 0, 3), "no channel": _pictures(1, 64, 64, 0),
        "1 channel": _pictures(1, 64, 64, 1), "2 channels": _pictures(1, 64, 64, 2), "a mask": _pictures(1, 64, 64),
        "5 channels": _pictures(1, 64, 64, 5), "one line": _pictures(1, 1, 5000, 3), "NaN": _pictures(1, 64, 64, 3,
        value=_NAN), "infinite": _pictures(1, 64, 64, 3, value=_INF), "5 axes": _pictures(1, 1, 64, 64, 3),
        "65 pictures": _pictures(65, 64, 64, 3),
        "a long line": _pictures(1, 1, 200_000, 3), "complex": lambda: torch.ones(1, 64, 64, 3, dtype=torch.complex64),
        **ANYTHING,
    },
    "MASK": {
        "of another size": lambda: torch.ones(1, 8, 8), "no mask": _pictures(0, 64, 64), "NaN": _pictures(1, 384, 384,
        value=_NAN), "4 axes": lambda: torch.ones(1, 1, 384, 384), **ANYTHING,
    },
    "AUDIO": {
        "NaN": _sound(1, 1, 999, value=_NAN), "rate 0": _sound(1, 1, 999, rate=0), "rate NaN": _sound(1, 1, 9,
        rate=_NAN),
        "rate -1": _sound(1, 1, 999, rate=-1), "rate text": _sound(1, 1, 999, rate="x"), "no batch": _sound(0, 1, 999),
        "no channel": _sound(1, 0, 999), "99 channels": _sound(1, 99, 999), "no sample": _sound(1, 1, 0),
        "1 axis": _sound(999), "no waveform": lambda: {"sample_rate": 16000}, "rate 2**40": _sound(1, 1, 9, rate=2**40),
        "a list": lambda: {"waveform": [0.0], "sample_rate": 16000}, **ANYTHING,
    },
    "LATENT": {
        "no clip": _latent(0, 16, 3, 8, 8), "two clips": _latent(2, 16, 3, 8, 8), "4 channels": _latent(1, 4, 3, 8, 8),
        "a picture's": _latent(1, 16, 8, 8), "no frame": _latent(1, 16, 0, 8, 8), "no pixel": _latent(1, 16, 3, 0, 0),
        "NaN": _latent(1, 16, 3, 8, 8, value=_NAN), "no samples": dict, "a list": lambda: {"samples": [0.0]},
        **ANYTHING,
    },
}  # fmt: skip


class _Any(str):
    """Fits every socket, as the types of many packs do."""

    def __ne__(self, other: object) -> bool:
        return False


class CampaignValue:
    """type and kind -> the value."""

    CATEGORY, FUNCTION, RETURN_TYPES = "campaign", "give", (_Any("*"),)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"type": ("STRING", {}), "kind": ("STRING", {})}}

    def give(self, type: str, kind: str) -> tuple[Any]:
        return ({**WIDGETS, **SOCKETS}.get(type, ANYTHING)[kind](),)


NODE_CLASS_MAPPINGS = {"CampaignValue": CampaignValue}
