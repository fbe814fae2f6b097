"""Footage: scenes, clips of the model's length and rate in them, and what is measured of each.

A clip's frames are the nearest ones in time, not means of several: a mean of neighbours shows a moving face twice, and
the face is what is learnt. Their times are off by at most half a frame of the footage.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer

from ..errors import MagicMirrorError, reason
from ..faces.analysis import Face
from ..faces.tracking import find_faces, follow
from ..video_reader import open_video, rgb
from .items import Item
from .measure import Measurer, Row, face_row, file_id, number, packed, perceptual_hash, said_of, spread

LOOK_EVERY = 4
"""Frames of a clip: faces are looked for in each latent frame, as the trainer's `precompute` does."""
_READ_EVERY = 16  # frames of a clip: two seconds of CogVideoX's, as long as a subtitle stays
_SEEN_WIDTH = 160  # pixels: of what cuts are looked for in
_FLOW_SIDE = 256  # pixels: the shorter side of what motion is measured in
_KEYS = 6  # faces of a clip that are kept as embeddings
_RECOGNISED = 60.0  # degrees of yaw: beyond, an embedding says little of who it is


@dataclass(frozen=True, kw_only=True)
class Footage:
    """times: (N,) seconds of each frame. cuts: numbers of the frames that begin a scene, the first one among them."""

    times: np.ndarray
    cuts: list[int]

    @property
    def rate(self) -> float:
        """Frames a second, on average; 0 for a single frame."""
        return float((len(self.times) - 1) / np.ptp(self.times)) if len(self.times) > 1 and np.ptp(self.times) else 0.0

    def clips(self, frames: int, fps: float) -> Iterator[list[int]]:
        """Frame numbers of each clip, one after the other through each scene."""
        for first, last in zip(self.cuts, [*self.cuts[1:], len(self.times)]):
            times = self.times[first:last]
            start, half = times[0], 0.5 / max(self.rate, fps)
            while start + (frames - 1) / fps <= times[-1] + half:
                wanted = start + np.arange(frames) / fps
                yield [first + int(index) for index in _nearest(times, wanted)]
                start += frames / fps


def _nearest(times: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    after = np.searchsorted(times, wanted).clip(1, max(1, len(times) - 1))
    if len(times) == 1:
        return np.zeros(len(wanted), int)
    return np.where(wanted - times[after - 1] <= times[after] - wanted, after - 1, after)


def measure_video(measurer: Measurer, item: Item) -> Iterator[Row]:
    """A row for each clip of a video, or one that says why there is none."""
    said, settings = said_of(item), measurer.settings
    try:
        with item.on_disk() as path:
            with measurer.stage("read"):
                said["of"] = file_id(path)
            with measurer.stage("scenes"):
                footage = look_through(path, settings.cut_threshold)
            clips = list(footage.clips(settings.frames, settings.fps))
            if not clips:
                length = f"{len(footage.cuts)} scenes, {np.ptp(footage.times):.1f} s in all"
                wanted = f"a clip takes {settings.frames / settings.fps:.1f} s"
                yield said | {"id": said["of"], "error": ["short", f"{length}; {wanted}"]}
            reader = Reader(path)
            for place, clip in enumerate(clips):
                # A frame that stands for several times is missing footage.
                rate = min(footage.rate, settings.fps * len(set(clip)) / len(clip))
                name = f"{said['of']}-{clip[0]}-{clip[-1]}-{len(clip)}"
                row = said | {"id": name, "clip": place, "frames": clip, "rate": number(rate)}
                yield row | _measure_clip(measurer, clip, reader, said["caption"])
    except (MagicMirrorError, av.FFmpegError, OSError) as error:
        yield said | {"id": said.get("of", item.name), "error": ["unreadable", reason(error)]}


def look_through(path: Path, cut_threshold: float) -> Footage:
    """Times and cuts of a video. Raises av.FFmpegError, OSError, MagicMirrorError."""
    from scenedetect import FrameTimecode
    from scenedetect.detectors import ContentDetector

    detector = ContentDetector(threshold=cut_threshold, min_scene_len=1)
    times, cuts = [], [0]
    with open_video(path) as container:
        if not container.streams.video:
            raise MagicMirrorError(f"{path.name} holds no pictures. Use a video file.")
        rate = container.streams.video[0].average_rate or 25
        for index, frame in enumerate(container.decode(video=0)):
            height = max(2, round(frame.height * _SEEN_WIDTH / frame.width))
            small = frame.to_ndarray(format="bgr24", width=_SEEN_WIDTH, height=height)
            cuts += [cut.frame_num for cut in detector.process_frame(FrameTimecode(index, 1.0), small)]
            times.append(float(index / rate) if frame.time is None else frame.time)
    if not times:
        raise MagicMirrorError(f"{path.name} holds no frame. Make or copy it again.")
    return Footage(times=np.array(times, np.float64), cuts=sorted(set(cuts)))


class Reader:
    """Frames of a video by their numbers, which must not fall; one is in memory at a time."""

    def __init__(self, path: Path) -> None:
        self._frames = enumerate(_decoded(path))
        self._index = -1
        self._picture: np.ndarray | None = None

    def at(self, index: int) -> np.ndarray:
        """(H, W, 3) uint8 RGB. Raises MagicMirrorError if the video ends before."""
        while self._index < index:
            self._index, decoded = next(self._frames, (index, None))
            if decoded is None:
                raise MagicMirrorError(f"the video ends before frame {index}, counted from 0; make or copy it again")
            if self._index == index:
                self._picture = rgb(*decoded)
        return self._picture


def _decoded(path: Path) -> Iterator[tuple[av.VideoFrame, InputContainer]]:
    with open_video(path) as container:
        for frame in container.decode(video=0):
            yield frame, container


def clip_frames(path: Path, indices: Sequence[int]) -> np.ndarray:
    """(F, H, W, 3) uint8 RGB of a clip. Raises MagicMirrorError, av.FFmpegError, OSError."""
    reader = Reader(path)
    return np.stack([reader.at(index) for index in indices])


def _measure_clip(measurer: Measurer, clip: list[int], reader: Reader, caption: str | None) -> Row:
    """Size, hash of three frames, motion, text, the tracked face."""
    import cv2

    from ..evaluation.flow import FlowMeter

    meter, hashes, last, by_models = FlowMeter(), [], None, {}
    looks: list[list[Row]] = []
    texts: list[float] = []
    found: list[tuple[int, Face]] = []
    for place, index in enumerate(clip):
        with measurer.stage("decode"):
            picture = reader.at(index)
        with measurer.stage("motion"):
            scale = min(1.0, _FLOW_SIDE / min(picture.shape[:2]))
            small = cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
            meter.add(small)
        if place in (0, len(clip) // 2, len(clip) - 1):
            with measurer.stage("hash"):
                hashes.append(perceptual_hash(picture))
        if place % _READ_EVERY == 0 or place == len(clip) - 1:
            texts.append(measurer.text(picture))
        if place == len(clip) // 2:
            by_models = measurer.by_models(picture, caption)
        if place % LOOK_EVERY == 0:
            with measurer.stage("faces"):
                faces = find_faces(measurer.analyzer, picture)
            tracked = follow(faces, last)
            looks.append([face_row(face) for face in sorted(faces, key=lambda face: face is not tracked)])
            if tracked is not None:
                last = tracked
                found.append((place, tracked))
    motion = 100 * float(np.mean(meter.strengths)) / min(small.shape[:2])
    known = [(place, face) for place, face in found if abs(face.yaw) <= _RECOGNISED]
    embeddings = [face.normed_embedding for _, face in known]
    return by_models | {
        "size": [picture.shape[1], picture.shape[0]],
        "hash": "".join(hashes),
        "motion": number(motion),
        "text": max(texts),
        "looks": looks,
        "same": number(min((one @ other for one, other in pairwise(embeddings)), default=1.0)),
        "keys": [
            {"frame": known[chosen][0], "yaw": number(known[chosen][1].yaw), "embedding": packed(embeddings[chosen])}
            for chosen in spread([face.yaw for _, face in known], _KEYS)
        ],
    }
