"""A look at a whole data set before anything is trained on it: everything that is wrong, counted and shown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av

from ..errors import MagicMirrorError, PromptError, SampleError
from ..video_reader import open_video
from .framing import check_size
from .manifest import VIDEOS, Sample, Source, check_length, manifest_path, parse_manifest, read_media, read_picture

SHOWN = 5
SAME_RATE = 0.02  # 24 frames a second are often 23.976


@dataclass(kw_only=True)
class Report:
    """What was found. `str` of it is for people, `to_json` for programs."""

    usable: list[str] = field(default_factory=list)
    """Ids of the samples that can be trained on, if a face is found in them."""
    samples: int = 0
    """Lines of the manifest."""
    problems: dict[str, list[str]] = field(default_factory=dict)
    """Reasons by kind, one for each sample, line or reference that cannot be used."""
    scaled: list[str] = field(default_factory=list)
    """Media of another size than the one that is trained: cropped around the head, or padded."""
    other_rate: list[str] = field(default_factory=list)
    """Videos at another rate than the base model's."""

    def add(self, kind: str, reason: str) -> None:
        self.problems.setdefault(kind, []).append(reason)

    def __str__(self) -> str:
        lines = [f"{len(self.usable)} of {self.samples} samples can be used"]
        if self.scaled:
            lines.append(f"{len(self.scaled)} are of another size: they are cropped around the head, or padded")
        if self.other_rate:
            lines.append(f"{len(self.other_rate)} are slower or faster than they will be played: {self.other_rate[0]}")
        for kind, reasons in sorted(self.problems.items()):
            lines += [f"{kind}: {len(reasons)}", *(f"  {reason}" for reason in reasons[:SHOWN])]
            if len(reasons) > SHOWN:
                lines.append(f"  ... and {len(reasons) - SHOWN} more")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        def shown(reasons: list[str]) -> dict[str, Any]:
            return {"count": len(reasons), "first": reasons[:SHOWN]}

        return {
            "samples": self.samples,
            "problems": {kind: shown(reasons) for kind, reasons in sorted(self.problems.items())},
            "scaled": shown(self.scaled),
            "other_rate": shown(self.other_rate),
            "usable": self.usable,
        }


def check_dataset(
    data: Path,
    *,
    width: int,
    height: int,
    frames: int,
    fps: int,
    check_caption: Callable[[str], object],
    on_progress: Callable[[int, int], None] = lambda done, samples: None,
) -> Report:
    """Read the manifest and look at every file it names; nothing is changed, and no face is looked for.

    Pictures and rendered clips are decoded, of videos the header and the first frame.

    data: a folder, or a manifest in it. width, height, frames: of what is trained; larger and longer media are fine.
    fps: the base model's, at which a clip's frames are played, whatever rate they are stored at.
    check_caption: raises PromptError for a caption that names no person.

    Raises SettingError if there is no manifest.
    """
    path = manifest_path(data)
    report = Report()
    samples: list[tuple[int, Sample]] = []
    for number, sample in parse_manifest(path):
        report.samples += 1
        if isinstance(sample, Sample):
            samples.append((number, sample))
        else:
            report.add("manifest", f"{path.name}, line {number}: {sample}")
    good_references: dict[str, bool] = {}
    for done, (number, sample) in enumerate(samples, 1):
        where = f"{path.name}, line {number} ({sample.id})"
        try:
            _check_caption(sample.caption, check_caption)
            larger, rate = _check_media(path.parent, sample.media, (width, height, frames))
            if larger:
                report.scaled.append(f"{where}: {larger}")
            if rate is not None and abs(rate / fps - 1) > SAME_RATE:
                report.other_rate.append(f"{where}: {rate:.3g} frames a second, not {fps}")
            media_problem = None
        except SampleError as error:
            report.add(error.kind, f"{where}: {error}")
            media_problem = error
        for reference in sample.references:
            if reference not in good_references:
                good_references[reference] = _check_reference(path.parent, reference, where, report)
        if not any(good_references[reference] for reference in sample.references):
            report.add("no usable reference", f"{where}: none of its {len(sample.references)} references can be read")
        elif media_problem is None:
            report.usable.append(sample.id)
        on_progress(done, len(samples))
    if not report.samples:
        report.add("manifest", f"{path} holds no sample; write a line for each")
    return report


def _check_caption(caption: str, check_caption: Callable[[str], object]) -> None:
    if not caption:
        raise SampleError("no caption", "the caption is missing or empty; say what is seen, and name the person")
    try:
        check_caption(caption)
    except PromptError as error:
        raise SampleError("caption", f"{caption!r}: {error}") from error


def _check_media(folder: Path, path: str, wanted: tuple[int, int, int]) -> tuple[str | None, float | None]:
    """What is larger than wanted, if it is, and frames a second of a clip, if it tells. Raises SampleError."""
    wanted_width, wanted_height, frames = wanted
    source, rate = Source.parse(path), None
    first = read_media(folder, path, 1)
    height, width = first.shape[1:3]
    check_size(width, height, wanted_width, wanted_height, path)
    length = len(first)
    if frames > 1 and source.frame is None and source.suffix in VIDEOS:
        length, rate = _length_and_rate(folder / source.file, path)
    if length is not None:
        check_length(length, frames, path)
    larger = (width, height) != (wanted_width, wanted_height)
    return f"{path} is {width} x {height} px" if larger else None, rate


def _length_and_rate(file: Path, path: str) -> tuple[int | None, float | None]:
    """Frames of a video, and frames a second; None where its header does not tell."""
    try:
        with open_video(file) as container:
            stream = container.streams.video[0]
            rate = stream.average_rate and float(stream.average_rate)
            seconds = container.duration and container.duration / av.time_base
            return stream.frames or (int(seconds * rate) if seconds and rate else None), rate
    except (av.FFmpegError, OSError) as error:
        raise SampleError("corrupt file", f"cannot read {path}: {error}. Make or copy the file again") from error


def _check_reference(folder: Path, reference: str, where: str, report: Report) -> bool:
    try:
        read_picture(folder, reference)
    except SampleError as error:
        report.add(f"reference: {error.kind}", f"{where}: {error}")
        return False
    except MagicMirrorError as error:
        report.add("reference", f"{where}: {error}")
        return False
    return True
