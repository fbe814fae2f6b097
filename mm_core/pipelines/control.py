"""How strongly, and at which steps, each part of the identity acts, and presets of it.

Imports neither torch nor diffusers: the nodes' schemas read it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from ..errors import SettingError

MAX_STRENGTH = 3.0


class Window(NamedTuple):
    """A part of the schedule: the steps whose position, step / steps, is in [start, end)."""

    start: float = 0.0
    end: float = 1.0


class Acting(NamedTuple):
    """What of the identity acts at one step."""

    fused: bool
    """The text is the prompt with the fused word; else the plain prompt."""
    can_scale: float
    """CAN's strength; 0 outside its window."""
    face: bool
    """The face stream runs, and the video attends to it."""

    @property
    def in_blocks(self) -> bool:
        """Whether the transformer's blocks have anything to add; else they are the base's own."""
        return self.face or self.can_scale > 0


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """How strongly, and when, the identity acts."""

    identity_scale: float = 1.0
    """Text fusion: how far the person's word becomes the person. 0 to 3."""
    can_scale: float = 1.0
    """CAN's residuals on the modulation of video and text. 0 to 3."""
    ip_scale: float = 1.0
    """The decoupled cross-attention to the face tokens. 0 to 3."""
    start: float = 0.0
    """Part of the schedule, 0 to 1, before which the base model runs alone."""
    end: float = 1.0
    """Part of the schedule after which it does again."""
    identity_window: Window | None = None
    """Text fusion's own start and end; None: those above. Outside, the text is the plain prompt, without slots."""
    can_window: Window | None = None
    """CAN's own start and end. Outside, its residuals are gone, as with `can` off."""
    ip_window: Window | None = None
    """The cross-attention's own start and end. Outside, the face stream is gone, as with `structure_branch` off."""
    in_negative: bool = False
    """Give the unconditional half of guidance the face stream and CAN too."""
    id_branch: bool = True
    """Ablation (Tab. 3): the ArcFace branch, that is text fusion and the identity that CAN sees."""
    structure_branch: bool = True
    """Ablation: the face stream and the cross-attention."""
    face_modulation: bool = True
    """Ablation: the face stream's own factors; without, it passes each block unmodulated, gates open."""
    can: bool = True
    """Ablation: CAN's residuals."""

    def __post_init__(self) -> None:
        for name in ("identity_scale", "can_scale", "ip_scale"):
            value = vars(self)[name]
            if not math.isfinite(value) or not 0 <= value <= MAX_STRENGTH:
                raise SettingError(f"{name} is {value}; it must be a number from 0 to {MAX_STRENGTH:g}.")
        _check_window("", Window(self.start, self.end))
        for name in ("identity", "can", "ip"):
            window = vars(self)[f"{name}_window"]
            if window is not None:
                _check_window(f"{name}_", window)

    @property
    def off(self) -> bool:
        """All strengths 0: the plain base model runs, without a face stream."""
        return self.identity_scale == self.can_scale == self.ip_scale == 0

    @property
    def windows(self) -> tuple[Window, Window, Window]:
        """Of text fusion, CAN and the cross-attention."""
        of_all = Window(self.start, self.end)
        identity, can, ip = (
            of_all if own is None else own for own in (self.identity_window, self.can_window, self.ip_window)
        )
        return identity, can, ip

    @property
    def fuses(self) -> bool:
        """Whether the prompt carries the identity at any step; if not, it need not name a person."""
        window = self.windows[0]
        return self.id_branch and not self.off and window.start < window.end

    def acting(self, inside: Callable[[Window], bool]) -> Acting:
        """What acts at a step. inside: whether the step is in a window; samplers count their steps differently."""
        if self.off:
            return Acting(fused=False, can_scale=0.0, face=False)
        identity, can, ip = self.windows
        return Acting(
            fused=self.fuses and inside(identity),
            can_scale=self.can_scale if inside(can) else 0.0,
            face=self.structure_branch and inside(ip),
        )

    def summary(self) -> str:
        """One line of strengths and windows, to show to the user."""
        scales = (self.identity_scale, self.can_scale, self.ip_scale)
        parts = zip(("text fusion", "CAN", "cross-attention"), scales, self.windows)
        return ", ".join(f"{name} {scale:g} from {start:g} to {end:g}" for name, scale, (start, end) in parts)


def _check_window(part: str, window: Window) -> None:
    """Raise SettingError for a window that is none. part: what its start and end are called after."""
    start, end = window
    for name, value in (("start", start), ("end", end)):
        if not math.isfinite(value) or not 0 <= value <= 1:
            raise SettingError(f"{part}{name} is {value}; it must be from 0 (first step) to 1 (last step).")
    if start > end:
        raise SettingError(f"{part}start ({start}) is after end ({end}); swap them.")


CUSTOM, BALANCED = "custom", "balanced"
# Starting points, not measured optima. The first steps lay out the clip and its motion, the last ones the details: a
# part that ends early leaves the rest of the clip to the base model.
CONTROLS: Mapping[str, AdapterSettings] = {
    "likeness first": AdapterSettings(can_scale=1.1, ip_scale=1.2),
    BALANCED: AdapterSettings(),
    "motion first": AdapterSettings(can_scale=0.8, ip_scale=0.8, can_window=Window(end=0.6), ip_window=Window(end=0.6)),
}
"""Named settings, by what they favour."""
