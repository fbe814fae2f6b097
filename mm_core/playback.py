"""What a video file is to play, and whether its format can hold that: known before a frame is encoded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from torch import Tensor

from .choices import VIDEO_FORMATS
from .errors import MagicMirrorError, SettingError

MIN_FPS, MAX_FPS = 0.01, 1000.0
MAX_REPEATS = 100
MIN_SOUND_RATE, MAX_SOUND_RATE = 1000, 768_000
LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1"}
"""The sound that streams hold, by its channels."""
WITH_SOUND = ("mp4", "webm")
MAX_SIDE = {"mp4": 16384, "webm": 65535, "webp": 16383, "gif": 65535}
"""Pixels. mp4: what x264 takes. webp and gif: what their headers hold."""

Audio = tuple[Tensor, int]
"""Sound: (channels, samples) in -1..1, and the samples per second."""


@dataclass(frozen=True, kw_only=True)
class Playback:
    """Which frames of a clip a file plays, in which order and how often."""

    skip_first: int = 0
    """Frames left out at the beginning, together with their sound."""
    skip_last: int = 0
    pingpong: bool = False
    """Play backwards after forwards, without showing the first and the last frame twice."""
    repeats: int = 0
    """How many more times it plays, to 100; 0: for ever in webp and gif, once in mp4 and webm."""
    trim_to_sound: bool = False
    """End with the sound, where that is shorter."""

    def order(self, count: int, rate: Fraction, audio: Audio | None) -> list[int]:
        """The frames that are played once through, out of `count` at `rate` a second.

        Raises:
            SettingError: numbers out of their range, or a clip of which nothing is left.
        """
        if self.skip_first < 0 or self.skip_last < 0:
            raise SettingError(
                f"{self.skip_first} frames are to be left out at the beginning and {self.skip_last} at the end; both "
                "must be 0 or more."
            )
        if not 0 <= self.repeats <= MAX_REPEATS:
            raise SettingError(f"The clip is to play {self.repeats} more times; it must be from 0 to {MAX_REPEATS}.")
        end = count - self.skip_last
        if self.trim_to_sound and audio is not None:
            end = min(end, math.ceil(Fraction(audio[0].shape[1], int(audio[1])) * rate))
        frames = list(range(self.skip_first, end))
        if not frames:
            raise SettingError(
                f"No frame is left of {count}: {self.skip_first} are left out at the beginning, {self.skip_last} at "
                f"the end{', and the clip ends with its sound' if self.trim_to_sound else ''}. Leave out fewer."
            )
        return frames + frames[-2:0:-1] if self.pingpong else frames


def frame_rate(fps: float | Fraction) -> Fraction:
    """As containers hold it: 24000 / 1001 and the like are exact."""
    return Fraction(fps).limit_denominator(1001)


def check_clip(
    frames: Tensor | np.ndarray, fps: float | Fraction, format: str, quality: int, audio: Audio | None
) -> None:
    """Refuse what `write_video` cannot write, as it says."""
    check_format(fps, format, quality, has_sound=audio is not None)
    check_frames(tuple(frames.shape), format)
    if audio is not None:
        _check_sound(*audio)


def check_format(fps: float | Fraction, format: str, quality: int, *, has_sound: bool) -> None:
    """What is known before there are frames. Raises SettingError."""
    if not math.isfinite(fps) or not MIN_FPS <= fps <= MAX_FPS:
        raise SettingError(f"The frame rate is {fps}; it must be from {MIN_FPS:g} to {MAX_FPS:g} frames per second.")
    if format not in VIDEO_FORMATS:
        raise SettingError(f"The format is {format!r}; choose one of {', '.join(VIDEO_FORMATS)}.")
    if not 0 <= quality <= 100:
        raise SettingError(f"The quality is {quality}; it must be from 0 to 100.")
    if has_sound and format not in WITH_SOUND:
        formats = " or ".join(WITH_SOUND)
        raise SettingError(f"A {format} file holds no sound; choose {formats}, or disconnect the audio.")


def check_frames(shape: tuple[int, ...], format: str) -> None:
    """Frames of this shape must be a clip, and fit into a file of the format. Raises MagicMirrorError."""
    if len(shape) != 4 or 0 in shape:
        raise MagicMirrorError(
            f"There is no clip to write: the frames have the shape {shape}; it must be (frames, height, width, 3) with "
            "at least one frame."
        )
    if shape[3] != 3:
        raise MagicMirrorError(
            f"There is no clip to write: the frames have {shape[3]} channels, shape {shape}; they must have 3, red, "
            "green and blue. Convert a mask to an image first."
        )
    height, width = shape[1:3]
    if max(height, width) > MAX_SIDE[format]:
        others = [name for name, side in MAX_SIDE.items() if max(height, width) <= side]
        raise MagicMirrorError(
            f"The frames are {width} x {height} px; a {format} file holds up to {MAX_SIDE[format]} px a side. Make "
            f"them smaller{', or choose ' + ' or '.join(others) if others else ''}."
        )


def _check_sound(samples: Tensor, rate: int) -> None:
    if samples.ndim != 2 or samples.shape[0] not in LAYOUTS:
        channels = samples.shape[0] if samples.ndim else 0
        raise SettingError(
            f"The audio has {channels} channels, shape {tuple(samples.shape)}; it must have "
            f"{', '.join(map(str, LAYOUTS))}. Mix it down to stereo, or disconnect it."
        )
    if not isinstance(rate, int | float) or not MIN_SOUND_RATE <= rate <= MAX_SOUND_RATE or rate != int(rate):
        raise SettingError(
            f"The audio has {rate} samples a second; it must be a whole number from {MIN_SOUND_RATE} to "
            f"{MAX_SOUND_RATE}. Resample it, or disconnect it."
        )
    if samples.is_floating_point() and not samples.isfinite().all():
        raise SettingError(
            "The audio holds values that are no numbers (NaN or infinite): make it again, or disconnect it."
        )
