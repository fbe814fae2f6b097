"""Frames to a file that players and browsers show: mp4, webm, animated webp, gif."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping, Sequence
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

from .errors import MagicMirrorError
from .files import Numbered, atomic_write
from .playback import LAYOUTS, Audio, Playback, check_clip, frame_rate

# Where ComfyUI puts the graph into a webp, and where its page looks for it: "prompt:..." in EXIF's Model, anything else
# in Make and the tags below.
_EXIF_MODEL, _EXIF_MAKE = 0x0110, 0x010F

# How the frames' RGB becomes what a stream stores, and what its tags say of it. Players guess the matrix of an untagged
# stream from its size, each in its own way. BT.601 at every size: what decodes in software rounds BT.709's blue away
# (libyuv's factors have 7 bits, Chromium was 10 of 255 levels off), and small clips are right even without tags.
_MATRIX = "ITU601"
_TAG_MATRIX, _TAG_PRIMARIES_709, _TAG_CURVE_SRGB, _TAG_RANGE_LIMITED = 6, 1, 13, 1

_OPUS_RATE = 48000
_AAC_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 64000, 88200, 96000)
_PALETTE_FRAMES = 16
_MAX_THREADS = 8  # each keeps frames of its own

Progress = Callable[[int, int], None]
"""(frames done, all frames), after each and while the rest is being packed. Raise in it to cancel."""


@dataclass(frozen=True, kw_only=True)
class _Codec:
    """How a container is filled."""

    container: str
    video: str
    audio: str
    worst_crf: float
    best_crf: float
    container_options: Mapping[str, str]
    video_options: Mapping[str, str]
    """Among them how many frames the encoder looks ahead, and so keeps."""

    def crf(self, quality: int) -> int:
        return round(self.worst_crf + (self.best_crf - self.worst_crf) * quality / 100)


_CODECS = {
    "mp4": _Codec(
        container="mp4",
        video="h264",
        audio="aac",
        worst_crf=51,
        best_crf=11,
        # Without the first flag mp4 drops every metadata key it does not know; the second lets a browser start early.
        container_options={"movflags": "use_metadata_tags+faststart"},
        video_options={"rc-lookahead": "20"},
    ),
    "webm": _Codec(
        container="webm",
        video="libvpx-vp9",
        audio="libopus",
        worst_crf=63,
        best_crf=15,
        container_options={},
        video_options={"row-mt": "1", "cpu-used": "4", "lag-in-frames": "12"},
    ),
}


def write_video(
    target: str | Path | Numbered,
    frames: Tensor | np.ndarray,
    fps: float | Fraction,
    *,
    format: str = "mp4",
    quality: int = 80,
    audio: Audio | None = None,
    metadata: Mapping[str, str] | None = None,
    playback: Playback | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write a clip, a frame at a time: under a temporary name in the same folder first, so that it is whole or not
    there. Beside the clip itself, some frames are in memory.

    Args:
        target: a path, whose file is replaced; or a `Numbered`, which replaces nothing.
        frames: (F, H, W, 3) RGB, uint8, or float from 0 to 1.
        fps: frames a second, 0.01 to 1000; webp keeps whole milliseconds, gif hundredths of a second.
        format: mp4 with H.264, webm with VP9, webp or gif.
        quality: from 0, the smallest file, to 100, the best picture; gif has no such choice.
        audio: cut to the length of the clip; in mp4 and webm only.
        metadata: texts in JSON by key. The workflow and the prompt are what ComfyUI restores a graph from; a gif holds
            none.
        playback: which frames are played, in which order, how often; None: all of them, forward.

    Raises:
        MagicMirrorError: no frames, not of this shape, too large for the format, or with values that are no numbers; a
            disk that is full or cannot be written to.
        SettingError: fps, format, quality, playback or sound that cannot be written.

    Returns: where the file is.
    """
    playback = playback or Playback()
    check_clip(frames, fps, format, quality, audio)
    rate = frame_rate(fps)
    order = playback.order(len(frames), rate, audio)
    clip = _Clip(frames, order * (1 + playback.repeats if format in _CODECS else 1), progress)
    target = Path(target) if isinstance(target, str) else target
    try:
        with atomic_write(target) as temporary:
            if format in _CODECS:
                sound = None if audio is None else _sound_from(audio, order[0] / rate)
                _write_stream(temporary, clip, rate, _CODECS[format], quality, sound, metadata or {})
            elif format == "webp":
                _write_webp(temporary, clip, rate, quality, metadata or {}, playback.repeats)
            else:
                _write_gif(temporary, clip, rate, playback.repeats)
    except av.FFmpegError as error:
        height, width = frames.shape[1:3]
        raise MagicMirrorError(
            f"The {format} encoder failed on {len(clip)} frames of {width} x {height} px at quality {quality}: "
            f"{error}. Choose another format or a smaller size."
        ) from error
    return target.path if isinstance(target, Numbered) else target


def write_picture(
    target: Path | Numbered, frame: Tensor | np.ndarray, metadata: Mapping[str, str] | None = None
) -> None:
    """A frame, (H, W, 3) RGB as in `write_video`, as a PNG picture with texts in it; whole or not at all."""
    text = PngInfo()
    for key, value in (metadata or {}).items():
        text.add_text(key, value)
    with atomic_write(target) as temporary:
        Image.fromarray(_to_uint8(frame)).save(temporary, format="PNG", pnginfo=text)


def _to_uint8(frame: Tensor | np.ndarray) -> np.ndarray:
    """A frame as (H, W, 3) uint8. Raises MagicMirrorError for values that are no numbers."""
    frame = torch.as_tensor(frame)
    if frame.dtype != torch.uint8:
        frame = frame.float()
        if not frame.isfinite().all():
            raise MagicMirrorError(
                "The frames hold values that are no numbers (NaN or infinite): the model that made them overflowed. "
                "Make them again with another precision; bf16 or fp32 in place of fp16."
            )
        frame = frame.clamp(0, 1).mul_(255).round_().to(torch.uint8)
    return frame.cpu().numpy()


class _Clip(Sequence[np.ndarray]):
    """The frames as they are played, (H, W, 3) uint8 each, made when they are asked for."""

    def __init__(self, frames: Tensor | np.ndarray, order: list[int], progress: Progress | None) -> None:
        self._frames = frames
        self._order = order
        self._progress = progress
        self.size = (frames.shape[2], frames.shape[1])
        self.done = 0

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> np.ndarray:
        """A frame that is about to be encoded; those before it are done."""
        self.done = max(self.done, index)
        self.alive()
        return _to_uint8(self._frames[self._order[index]])

    def sample(self, count: int) -> list[np.ndarray]:
        """At most `count` frames from the whole clip, at half the size, which do not count as done."""
        return [_to_uint8(self._frames[i])[::2, ::2] for i in self._order[:: -(-len(self._order) // count)]]

    def alive(self) -> None:
        """Let whoever watches cancel."""
        if self._progress is not None:
            self._progress(self.done, len(self))

    def finish(self) -> None:
        self.done = len(self)
        self.alive()


def _write_stream(
    path: Path,
    clip: _Clip,
    rate: Fraction,
    codec: _Codec,
    quality: int,
    audio: Audio | None,
    metadata: Mapping[str, str],
) -> None:
    width, height = clip.size
    with av.open(str(path), "w", format=codec.container, options=dict(codec.container_options)) as container:
        container.metadata.update(metadata)
        video = container.add_stream(
            codec.video, rate=rate, options={"crf": str(codec.crf(quality))} | dict(codec.video_options)
        )
        # Colour is stored for 2 x 2 pixels at a time: an odd side gets its last line twice.
        video.width, video.height = width + width % 2, height + height % 2
        video.pix_fmt = "yuv420p"
        video.bit_rate = 0  # the quality alone decides
        video.codec_context.thread_count = min(_MAX_THREADS, os.cpu_count() or 1)
        _tag_colours(video.codec_context)
        sound = None if audio is None else _Sound(container, codec, audio)
        for index, frame in enumerate(clip):
            padded = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            container.mux(video.encode(_to_yuv(padded)))
            if sound is not None:
                sound.write_until((index + 1) / rate)
        for packet in video.codec_context.encode_lazy(None):
            packet.stream = video
            container.mux(packet)
            clip.alive()
        if sound is not None:
            sound.finish()
        clip.finish()


def _tag_colours(context: av.VideoCodecContext) -> None:
    context.colorspace, context.color_range = _TAG_MATRIX, _TAG_RANGE_LIMITED
    context.color_primaries, context.color_trc = _TAG_PRIMARIES_709, _TAG_CURVE_SRGB


def _to_yuv(frame: np.ndarray) -> av.VideoFrame:
    """(H, W, 3) RGB with even sides, as it is stored."""
    # Without a range it is the limited one. Named, PyAV before 12.3 makes the full one of it.
    picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(
        format="yuv420p", src_colorspace=_MATRIX, dst_colorspace=_MATRIX
    )
    picture.colorspace, picture.color_range = _TAG_MATRIX, _TAG_RANGE_LIMITED
    return picture


def _sound_from(audio: Audio, seconds: Fraction) -> Audio | None:
    """What is left of a sound; None where nothing is."""
    samples = audio[0][:, round(seconds * int(audio[1])) :]
    return (samples, int(audio[1])) if samples.shape[1] else None


class _Sound:
    """The sound of a stream, written beside its frames, so that a player finds both together."""

    def __init__(self, container: av.container.OutputContainer, codec: _Codec, audio: Audio) -> None:
        """At the sound's own rate if the codec knows it; else PyAV resamples while encoding."""
        self._samples, self._rate = audio[0].detach().float().cpu(), int(audio[1])
        self._layout = LAYOUTS[len(self._samples)]
        stored = self._rate
        if codec.audio == "libopus":
            stored = _OPUS_RATE
        elif stored not in _AAC_RATES:
            stored = min(_AAC_RATES, key=lambda known: (known < stored, abs(known - stored)))
        self._container = container
        self._stream = container.add_stream(codec.audio, rate=stored, layout=self._layout)
        self._written = 0

    def write_until(self, seconds: Fraction) -> None:
        """Encode what is played up to a time of the clip."""
        end = round(seconds * self._rate)
        block = np.ascontiguousarray(self._samples[:, self._written : end].numpy())
        if block.shape[1] == 0:
            return
        frame = av.AudioFrame.from_ndarray(block, format="fltp", layout=self._layout)
        frame.sample_rate, frame.pts, frame.time_base = self._rate, self._written, Fraction(1, self._rate)
        self._container.mux(self._stream.encode(frame))
        self._written = end

    def finish(self) -> None:
        self._container.mux(self._stream.encode())


class _Pictures(Image.Image):
    """A clip as Pillow reads an animated file: one picture at a time, so that it never holds them all."""

    def __init__(self, clip: _Clip, convert: Callable[[Image.Image], Image.Image] = lambda picture: picture) -> None:
        super().__init__()
        self._clip = clip
        self._convert = convert
        self._index = -1
        self.n_frames = len(clip)
        self.is_animated = len(clip) > 1
        self.seek(0)

    def seek(self, frame: int) -> None:
        if frame >= self.n_frames:
            raise EOFError("there are no more frames")
        if frame != self._index:
            picture = self._convert(Image.fromarray(self._clip[frame]))
            self.im, self._mode, self._size, self.palette = picture.im, picture.mode, picture.size, picture.palette
            self._index = frame

    def tell(self) -> int:
        return self._index


class _Watched(io.BufferedWriter):
    """A file that lets whoever watches the clip cancel while it is written. It writes all that it is given or raises:
    on a disk that fills up an unbuffered one writes a part, which Pillow does not look at."""

    def __init__(self, path: Path, clip: _Clip) -> None:
        super().__init__(io.FileIO(path, "wb"))
        self._clip = clip

    def write(self, data: bytes) -> int:
        self._clip.alive()
        return super().write(data)


def _write_webp(
    path: Path, clip: _Clip, rate: Fraction, quality: int, metadata: Mapping[str, str], repeats: int
) -> None:
    exif = Image.Exif()
    others = [key for key in metadata if key != "prompt"]
    if "prompt" in metadata:
        exif[_EXIF_MODEL] = f"prompt:{metadata['prompt']}"
    for offset, key in enumerate(others):
        exif[_EXIF_MAKE - offset] = f"{key}:{metadata[key]}"
    with _Watched(path, clip) as file:
        _Pictures(clip).save(
            file,
            format="WEBP",
            save_all=True,
            duration=_durations(len(clip), rate, 1),
            loop=repeats + 1 if repeats else 0,  # how often it plays; 0: for ever
            quality=quality,
            method=4,
            exif=exif,
        )


def _write_gif(path: Path, clip: _Clip, rate: Fraction, repeats: int) -> None:
    """All frames share one palette, made from the whole clip: palettes of their own would flicker."""
    sample = np.concatenate(clip.sample(_PALETTE_FRAMES))
    palette = Image.fromarray(sample).quantize(256, method=Image.Quantize.MEDIANCUT)

    def convert(picture: Image.Image) -> Image.Image:
        return picture.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG)

    with _Watched(path, clip) as file:
        _Pictures(clip, convert).save(
            file,
            format="GIF",
            save_all=True,
            duration=_durations(len(clip), rate, 10),
            loop=repeats,  # how often it plays again; 0: for ever
            optimize=False,
        )


def _durations(count: int, rate: Fraction, unit: int) -> list[int]:
    """Milliseconds of each frame in whole `unit`s, so that rounding does not add up along the clip."""
    ends = [round(1000 * index / rate / unit) * unit for index in range(count + 1)]
    return [end - start for start, end in pairwise(ends)]
