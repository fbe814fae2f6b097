"""What nodes are given: ComfyUI looks at the values of widgets, but not at what comes from other nodes."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any

import numpy as np
from comfy_api.latest import io
from torch import Tensor

from ..mm_core.errors import SettingError
from ..mm_core.pipelines.control import AdapterSettings
from .types import ControlSocket, IdentitySocket, Model, ModelSocket, Person

_SOCKETS: dict[str, tuple[Callable[[Any], bool], str]] = {
    ModelSocket.io_type: (lambda value: isinstance(value, Model), "a model from Load MagicMirror"),
    IdentitySocket.io_type: (lambda value: isinstance(value, Person), "an identity, from Extract Face Embedding"),
    ControlSocket.io_type: (lambda value: isinstance(value, AdapterSettings), "what Control gives"),
    "MODEL": (lambda value: hasattr(value, "get_model_object"), "a MODEL from a loader of ComfyUI"),
    "CLIP": (lambda value: hasattr(value, "tokenize"), "a CLIP from Load CLIP"),
    "IMAGE": (lambda value: isinstance(value, Tensor) and not value.is_complex(), "a batch of pictures"),
    "MASK": (lambda value: isinstance(value, Tensor) and not value.is_complex(), "a mask"),
    "LATENT": (lambda value: _holds(value, "samples"), "a latent"),
    "AUDIO": (lambda value: _holds(value, "waveform") and "sample_rate" in value, "a sound"),
}
_WIDGETS = (io.Int.Input, io.Float.Input, io.Boolean.Input, io.String.Input, io.Combo.Input)


def check_inputs(node: type[io.ComfyNode], inputs: Mapping[str, Any]) -> None:
    """Raises SettingError for a value of another type than the input's, or beyond the limits of its widget.

    What `validate_inputs` of the node names has limits of its own, as for ComfyUI.
    """
    own = inspect.signature(node.validate_inputs).parameters
    for item in node.define_schema().inputs:
        if item.id not in inputs or (inputs[item.id] is None and item.optional and not isinstance(item, _WIDGETS)):
            continue
        wanted = _wanted(item, inputs[item.id], limited=item.id not in own)
        if wanted:
            raise SettingError(
                f"{item.id} is {_shown(inputs[item.id])}; it must be {wanted}. Change it, or connect another node."
            )


def _wanted(item: io.Input, value: Any, *, limited: bool) -> str | None:
    """What the value should be; None if it is that."""
    if isinstance(item, (io.Int.Input, io.Float.Input)):
        return _wanted_number(item, value, limited=limited)
    if isinstance(item, io.Boolean.Input):
        return None if isinstance(value, (bool, Integral, np.bool_)) else "true or false"
    if isinstance(item, io.String.Input):
        return None if isinstance(value, str) else "a text"
    if isinstance(item, io.Combo.Input):
        if isinstance(value, str) and (not limited or value in item.options):
            return None
        return f"one of {', '.join(item.options)}" if limited else "a name"
    known = [_SOCKETS[kind] for kind in item.get_io_type().split(",") if kind in _SOCKETS]
    return None if any(fits(value) for fits, _ in known) else " or ".join(text for _, text in known)


def _wanted_number(item: io.Int.Input | io.Float.Input, value: Any, *, limited: bool) -> str | None:
    whole = isinstance(item, io.Int.Input)
    fits = isinstance(value, Integral if whole else Real)
    if fits and limited:
        fits = math.isfinite(value) and item.min <= value <= item.max
    if fits:
        return None
    return f"a {'whole ' if whole else ''}number" + (f" from {item.min:g} to {item.max:g}" if limited else "")


def _holds(value: Any, name: str) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get(name), Tensor)


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, (str, Real)):
        return repr(value)[:100] if isinstance(value, str) else str(value)[:100]
    return f"a {type(value).__name__}"
