"""Frames to a file that players and browsers show, mp4, webm, animated webp, gif; and a video file to frames."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from .choices import VIDEO_FORMATS
from .errors import MagicMirrorError, SettingError
from .files import whole_file

MAX_FPS = 1000.0

Audio = tuple[Tensor, int]
"""Sound: (channels, samples) in -1..1, and the samples per second."""

_LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1"}
_OPUS_RATE = 48000
_AAC_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 64000, 88200, 96000)

# Where ComfyUI puts the graph into a webp, and where its page looks for it: "prompt:..." in EXIF's Model, anything else
# in Make and the tags below.
_EXIF_MODEL, _EXIF_MAKE = 0x0110, 0x010F


@dataclass(frozen=True, kw_only=True)
class _Codec:
    """How a container is filled."""

    video: str
    audio: str
    worst_crf: float
    best_crf: float
    container_options: Mapping[str, str]
    video_options: Mapping[str, str]

    def crf(self, quality: int) -> int:
        return round(self.worst_crf + (self.best_crf - self.worst_crf) * quality / 100)


_CODECS = {
    "mp4": _Codec(
        video="h264",
        audio="aac",
        worst_crf=51,
        best_crf=11,
        # Without the first flag mp4 drops every metadata key it does not know; the second lets a browser start early.
        container_options={"movflags": "use_metadata_tags+faststart"},
        video_options={},
    ),
    "webm": _Codec(
        video="libvpx-vp9",
        audio="libopus",
        worst_crf=63,
        best_crf=15,
        container_options={},
        video_options={"row-mt": "1", "cpu-used": "4"},
    ),
}


def read_frames(path: Path) -> Iterator[np.ndarray]:
    """The frames of a video file, one after the other, (H, W, 3) uint8 RGB.

    Raises MagicMirrorError if the file is missing, damaged or no video.
    """
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise MagicMirrorError(f"{path} holds no pictures, only sound or data. Use a video file")
            for frame in container.decode(video=0):
                yield frame.to_ndarray(format="rgb24")
    except (av.FFmpegError, OSError) as error:
        raise MagicMirrorError(f"cannot read the video {path}: {error}. Make or copy the file again") from error


def write_video(
    path: str | Path,
    frames: Tensor | np.ndarray,
    fps: float | Fraction,
    *,
    format: str = "mp4",
    quality: int = 80,
    audio: Audio | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write a clip: under a temporary name in the same folder first, so that `path` is whole or not there.

    Args:
        frames: (F, H, W, 3) RGB, uint8, or float from 0 to 1.
        fps: frames a second, above 0 to 1000; webp keeps whole milliseconds, gif hundredths of a second.
        format: mp4 with H.264, webm with VP9, webp or gif.
        quality: from 0, the smallest file, to 100, the best picture; gif has no such choice.
        audio: cut to the length of the clip; in mp4 and webm only.
        metadata: texts in JSON by key. The workflow and the prompt are what ComfyUI restores a graph from; a gif holds
            none.

    Raises:
        MagicMirrorError: no frames, or not of this shape.
        SettingError: fps, format, quality or sound that cannot be written.
    """
    path = Path(path)
    pixels = _to_uint8(frames)
    _check(fps, format, quality, audio)
    rate = Fraction(fps).limit_denominator(1001)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        if format in _CODECS:
            _write_stream(temporary, pixels, rate, format, quality, audio, metadata or {})
        elif format == "webp":
            _write_webp(temporary, pixels, rate, quality, metadata or {})
        else:
            _write_gif(temporary, pixels, rate)
    return path


def write_picture(path: Path, frame: Tensor | np.ndarray, metadata: Mapping[str, str]) -> None:
    """A frame, (H, W, 3) RGB as in `write_video`, as a picture with texts in it; whole or not at all."""
    text = PngInfo()
    for key, value in metadata.items():
        text.add_text(key, value)
    with whole_file(path) as temporary:
        Image.fromarray(_to_uint8(frame[None])[0]).save(temporary, format="PNG", pnginfo=text)


def _check(fps: float | Fraction, format: str, quality: int, audio: Audio | None) -> None:
    if not math.isfinite(fps) or not 0 < fps <= MAX_FPS:
        raise SettingError(f"The frame rate is {fps}; it must be above 0 and at most {MAX_FPS:g} frames per second.")
    if format not in VIDEO_FORMATS:
        raise SettingError(f"The format is {format!r}; choose one of {', '.join(VIDEO_FORMATS)}.")
    if not 0 <= quality <= 100:
        raise SettingError(f"The quality is {quality}; it must be from 0 to 100.")
    if audio is None:
        return
    if format not in _CODECS:
        raise SettingError(f"A {format} file holds no sound; choose {' or '.join(_CODECS)}, or disconnect the audio.")
    if audio[0].shape[0] not in _LAYOUTS:
        raise SettingError(f"The audio has {audio[0].shape[0]} channels; it must have {', '.join(map(str, _LAYOUTS))}.")


def _to_uint8(frames: Tensor | np.ndarray) -> np.ndarray:
    if frames.ndim != 4 or 0 in frames.shape or frames.shape[-1] != 3:
        raise MagicMirrorError(
            f"There is no clip to write: the frames have the shape {tuple(frames.shape)}; it must be (frames, height, "
            "width, 3) with at least one frame."
        )
    frames = torch.as_tensor(frames)
    if frames.dtype != torch.uint8:
        frames = (frames.float().clamp(0, 1) * 255).round().to(torch.uint8)
    return frames.cpu().numpy()


def _write_stream(
    path: Path,
    frames: np.ndarray,
    rate: Fraction,
    format: str,
    quality: int,
    audio: Audio | None,
    metadata: Mapping[str, str],
) -> None:
    codec = _CODECS[format]
    height, width = frames.shape[1:3]
    # Colour is stored for 2 x 2 pixels at a time: an odd side gets its last line twice.
    frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    with av.open(str(path), "w", format=format, options=dict(codec.container_options)) as container:
        container.metadata.update(metadata)
        options = {"crf": str(codec.crf(quality))} | dict(codec.video_options)
        video = container.add_stream(codec.video, rate=rate, options=options)
        video.height, video.width = frames.shape[1:3]
        video.pix_fmt = "yuv420p"
        video.bit_rate = 0  # the quality alone decides
        sound = None if audio is None else _add_sound(container, codec, audio[1], _LAYOUTS[audio[0].shape[0]])
        for frame in frames:
            container.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(video.encode())
        if audio is not None:
            samples = round(audio[1] * len(frames) / rate)
            for block in _sound_blocks(audio[0][:, :samples], audio[1]):
                container.mux(sound.encode(block))
            container.mux(sound.encode())


def _add_sound(
    container: av.container.OutputContainer, codec: _Codec, rate: int, layout: str
) -> av.audio.stream.AudioStream:
    """An audio stream at the sound's own rate if the codec knows it; else PyAV resamples while encoding."""
    if codec.audio == "libopus":
        rate = _OPUS_RATE
    elif rate not in _AAC_RATES:
        rate = min(_AAC_RATES, key=lambda known: (known < rate, abs(known - rate)))
    return container.add_stream(codec.audio, rate=rate, layout=layout)


def _sound_blocks(samples: Tensor, rate: int) -> Iterator[av.AudioFrame]:
    """One second at a time."""
    samples = samples.detach().float().cpu()
    for start in range(0, samples.shape[1], rate):
        block = np.ascontiguousarray(samples[:, start : start + rate].numpy())
        frame = av.AudioFrame.from_ndarray(block, format="fltp", layout=_LAYOUTS[samples.shape[0]])
        frame.sample_rate, frame.pts, frame.time_base = rate, start, Fraction(1, rate)
        yield frame


def _write_webp(path: Path, frames: np.ndarray, rate: Fraction, quality: int, metadata: Mapping[str, str]) -> None:
    exif = Image.Exif()
    others = [key for key in metadata if key != "prompt"]
    if "prompt" in metadata:
        exif[_EXIF_MODEL] = f"prompt:{metadata['prompt']}"
    for offset, key in enumerate(others):
        exif[_EXIF_MAKE - offset] = f"{key}:{metadata[key]}"
    first, *rest = map(Image.fromarray, frames)
    first.save(
        path,
        format="WEBP",
        save_all=True,
        append_images=rest,
        duration=_durations(len(frames), rate, 1),
        loop=0,
        quality=quality,
        method=4,
        exif=exif,
    )


def _write_gif(path: Path, frames: np.ndarray, rate: Fraction) -> None:
    """All frames share one palette, made from the whole clip: palettes of their own would flicker."""
    sample = frames[:: max(1, len(frames) // 16)]
    palette = Image.fromarray(np.concatenate(sample)).quantize(256, method=Image.Quantize.MEDIANCUT)
    first, *rest = (Image.fromarray(f).quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG) for f in frames)
    durations = _durations(len(frames), rate, 10)
    first.save(path, format="GIF", save_all=True, append_images=rest, duration=durations, loop=0, optimize=False)


def _durations(count: int, rate: Fraction, unit: int) -> list[int]:
    """Milliseconds of each frame in whole `unit`s, so that rounding does not add up along the clip."""
    ends = [round(1000 * index / rate / unit) * unit for index in range(count + 1)]
    return [end - start for start, end in pairwise(ends)]
