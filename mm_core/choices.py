"""The names that options have: what menus, the command line and the checks of settings offer.

Plain Python: the nodes' schemas read it where diffusers may be missing.
"""

from __future__ import annotations

from importlib.util import find_spec

from .errors import SettingError

TINY = "tiny"
"""The base model that comes with the pack."""

QUANTISED = {"int8": ("torchao",), "nf4": ("torchao", "bitsandbytes")}
"""Types that the base's blocks are stored in, and the packages of each; the text encoder's are int8 with either."""

STORED = ("fp8", *QUANTISED)
"""Types to store in; they compute as auto does."""

PRECISIONS = ("auto", "bf16", "fp16", "fp32", *STORED)

POLICIES = ("none", "model", "group", "sequential")
"""none: all on the device. model: one model at a time. group: a block at a time, the next one copied meanwhile.
sequential: a layer at a time (a block where it carries an identity), the slowest and smallest."""

OFFLOADING = ("auto", *POLICIES)

SCHEDULERS = ("dpm", "ddim")
"""CogVideoX's own."""

AS_MODEL = "as the model"
"""A choice, as 0 is a number, that leaves the value to the base model."""

DRAFT = "draft"
"""A choice in the same place: the model's values but for those of `Sampling.draft`."""

STEP_CACHES = ("off", "balanced", "fast")
"""How readily a step reuses the step before instead of being computed."""

ATTENTIONS = ("native", "flash", "sage", "xformers")
"""Kernels of the attention, by diffusers' names. native: torch's own. The others are packages."""

SYSTEMS = ("magic-mirror", "cogvideox", "cogvideox-i2v", "consisid", "easyanimate")
"""What makes the clips of a benchmark."""

EXPORTS = ("vbench", "opens2v")
"""Other benchmarks that a benchmark's clips are named for."""

VIDEO_FORMATS = ("mp4", "webm", "webp", "gif")
"""By their file endings."""


def precisions() -> list[str]:
    """Those whose packages are installed."""
    return [precision for precision in PRECISIONS if not _missing(precision)]


def check_precision(precision: str) -> None:
    """Raise SettingError for an unknown one, and for one whose packages are not installed."""
    if precision not in PRECISIONS:
        raise SettingError(f"The precision is {precision!r}; choose one of {', '.join(PRECISIONS)}.")
    missing = _missing(precision)
    if missing:
        raise SettingError(
            f"The precision {precision} needs {' and '.join(missing)}, which this Python lacks. Install with it: "
            f"python -m pip install {' '.join(missing)}. Or choose fp8 or auto."
        )


def _missing(precision: str) -> list[str]:
    return [package for package in QUANTISED.get(precision, ()) if find_spec(package) is None]
