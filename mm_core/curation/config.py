"""What a training set is made by: how its inputs are measured, and which of them are kept. Two groups of settings:
whoever changes one of `keep` decides anew by the measurements that are there, and measures nothing again."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

from ..faces.references import MIN_SHARPNESS, MIN_SIZE
from ..pipelines.presets import limits_of

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)
Kind = Literal["pictures", "portraits", "pairs", "video"]
"""The paper's sources: A pictures with captions, B portraits with a standard caption, C a picture and another of the
same person that a generator made, D footage."""
HEIGHT, MIN_LINES = 480, 720
"""The paper's: of its model, and of what it is trained on."""
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Cosine = Annotated[float, Field(ge=-1, le=1)]
Degrees = Annotated[float, Field(ge=0, le=180)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Measuring:
    """What the measurements depend on: another value measures everything again."""

    insightface_root: str = "~/.insightface"
    face_pack: str = "buffalo_l"
    captioner: str | None = None
    """Folder of an image-text-to-text model of transformers, for what has no caption."""
    safety: str | None = None
    """Folder of an image-classification model of transformers; `keep.refused_labels` says which labels are refused."""
    frames: Count = 49
    """Of a clip: 8N + 1, the base model's."""
    fps: Positive = 8.0
    """Frames a second of a clip, the base model's: 8 for CogVideoX, 16 for 1.5."""
    cut_threshold: Positive = 27.0
    """Of PySceneDetect's ContentDetector: the mean change of hue, saturation and brightness that is a cut."""

    @model_validator(mode="after")
    def _check(self) -> Measuring:
        if self.frames % 8 != 1 or self.frames < 9:
            raise ValueError(f"measure.frames is {self.frames}; it must be 8N + 1: 9, 17, ... 49")
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Keeping:
    """The thresholds. What is measured is within them, or dropped with the rule's name for a reason."""

    min_lines: Count = MIN_LINES
    """Pixels of the shorter side."""
    min_score: Share = 0.6
    """Of the face detector; fainter finds are no faces. Old photographs of people with glasses have 0.63."""
    max_faces: Count = 1
    """Faces of at least `other_face` of the largest one's size."""
    other_face: Share = 0.25
    min_face_size: Positive = float(MIN_SIZE)
    """Pixels of the larger side of the face's box. In a clip: in half of its frames."""
    min_sharpness: Annotated[float, Field(ge=0)] = MIN_SHARPNESS
    """As `faces.analysis.Face` has it."""
    max_yaw: Degrees = 60.0
    """Of a picture's face; in clips heads may turn."""
    max_roll: Degrees = 45.0
    max_text: Annotated[float, Field(ge=0, le=100)] = 0.5
    """Percent of the picture that is covered by text; of a clip, of the frame with most of it."""
    banned_words: tuple[str, ...] = ("text",)
    """A caption with one of them speaks of writing in the picture."""
    refused_labels: tuple[str, ...] = ()
    max_unsafe: Share = 0.5
    """The score of a refused label from which on an item is dropped."""
    near_duplicate: Annotated[int, Field(ge=0, le=128)] = 24
    """Bits of 256 by which perceptual hashes differ at most that are of one picture; of a clip, in each of three
    frames. The one with more lines stays."""
    min_pair_cosine: Cosine = 0.65
    """Pairs: between both pictures' faces."""
    same_identity: Cosine = 0.65
    """Pairs: two references that are as near as this are one person, of whom the first is kept."""
    min_seen: Share = 0.5
    """Clips: part of the frames looked at, every fourth, in which the face is found."""
    turned: Degrees = 40.0
    """Clips: beyond this yaw a face may be lost: the head turns away. Where it is lost otherwise, the clip goes."""
    min_same_face: Cosine = 0.5
    """Clips: between a face and the one before it in the clip; below, it is another person's."""
    min_motion: Annotated[float, Field(ge=0)] = 0.05
    """Clips: mean optical flow from frame to frame, in percent of the shorter side."""
    max_motion: Positive = 15.0
    references: Annotated[int, Field(ge=1, le=64)] = 4
    """Clips: photos of the person, at most, from other clips."""
    min_reference_cosine: Cosine = 0.87
    """Clips: between a face of a clip and one of another clip that becomes its reference: below, perhaps another
    person; above the next one, the same moment."""
    max_reference_cosine: Cosine = 0.97


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CurationConfig:
    """Both groups, and the shape of what will be trained."""

    measure: Measuring = dataclasses.field(default_factory=Measuring)
    keep: Keeping = dataclasses.field(default_factory=Keeping)
    width: Annotated[int, Field(ge=16, multiple_of=16)] = 720
    """Of what will be trained: portraits get black borders to this shape."""
    height: Annotated[int, Field(ge=16, multiple_of=16)] = HEIGHT


def settings_of_model(name: str) -> dict[str, str]:
    """By dotted name, what a training set for a base model must have: length, rate, shape, and as many lines as the
    paper takes for its model, 720 for 480, or the model's own where it has more.

    name: `tiny` or a published one. Raises SettingError.
    """
    limits = limits_of(name)
    settings = {
        "measure.frames": limits.num_frames, "measure.fps": limits.fps, "width": limits.width, "height": limits.height,
        "keep.min_lines": max(limits.height, min(MIN_LINES, limits.height * MIN_LINES // HEIGHT)),
    }  # fmt: skip
    return {setting: str(value) for setting, value in settings.items()}
