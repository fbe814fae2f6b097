"""The names that options have: what menus, the command line and the checks of settings offer.

Plain Python: the nodes' schemas read it where diffusers may be missing.
"""

from __future__ import annotations

TINY = "tiny"
"""The base model that comes with the pack."""

PRECISIONS = ("auto", "bf16", "fp16", "fp32", "fp8")
"""fp8 is a storage type of the transformer; it computes as auto does."""

POLICIES = ("none", "model", "group", "sequential")
"""none: all on the device. model: one model at a time. group: a block at a time, the next one copied meanwhile.
sequential: a layer at a time (a block where it carries an identity), the slowest and smallest."""

OFFLOADING = ("auto", *POLICIES)

SCHEDULERS = ("dpm", "ddim")
"""CogVideoX's own."""

AS_MODEL = "as the model"
"""A choice, as 0 is a number, that leaves the value to the base model."""

STEP_CACHES = ("off", "balanced", "fast")
"""How readily a step reuses the step before instead of being computed."""

VIDEO_FORMATS = ("mp4", "webm", "webp", "gif")
"""By their file endings."""
