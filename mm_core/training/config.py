"""What a training run of the adapter is: dataclasses, read strictly from YAML (`configs/` has the paper's recipe)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from ..choices import TINY
from ..errors import SettingError
from ..models.config import AdapterConfig
from ..pipelines import tiny
from ..settings_file import load_settings
from .loop_config import STRICT, Count, CountOrNone, LoopConfig

Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SamplingConfig:
    """How the model samples the clips that its identity loss then judges: DDIM, as validation and inference do."""

    clips: Count
    """In the making at a time, a multiple of `batch_size`; each step of training takes the next batch of them a step
    further. Many: a clip that comes up again soon is learnt by heart."""
    steps: Annotated[int, Field(ge=1, le=1000)] = 25
    guidance: Annotated[float, Field(ge=1)] = 6.0
    """Of the classifier-free guidance; what is judged is the guided x0, which is what a user sees."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class StageConfig:
    """One of the two stages: `image`, single pictures, or `video` (paper Sec. 3.4)."""

    data: str
    """Folder of the dataset, `manifest.jsonl` and what it names, or another manifest in it (docs/training.md)."""
    features: str
    """Folder of what the frozen models make of it, once; may be on a faster disk."""
    frames: Count
    """Of each clip; 1 for pictures, else 8N + 1 (CogVideoX 1.0) or 16N + 1 (1.5)."""
    loop: LoopConfig
    text_dropout: Share = 0.1
    """Part of the samples whose prompt is the empty one: the identity alone is seen."""
    max_references: Count = 1
    """Photos of the person that a sample sees: 1 to so many, drawn anew each time."""
    face_area: Share = 0.5
    """Part of the samples whose noise loss is averaged over the face's area only."""
    identity_weight: Annotated[float, Field(ge=0)] = 0.0
    """lambda of the identity loss; 0 switches it off, and nothing of it is then loaded or computed."""
    identity_start: CountOrNone = 0
    """Step from which on it acts."""
    identity_timesteps: tuple[int, int] = (0, 500)
    """Noise levels at which it acts, first included, last excluded: at high noise `x0` is a blur without a face."""
    sampling: SamplingConfig | None = None
    """Judge clips that the model samples itself, one beside each sample; None: the noised samples, as in the paper."""

    @model_validator(mode="after")
    def _check(self) -> StageConfig:
        low, high = self.identity_timesteps
        if not 0 <= low < high <= 1000:
            raise ValueError(f"identity_timesteps is {low}, {high}; it must be two numbers rising within 0 to 1000")
        if self.sampling is not None and not self.identity_weight:
            raise ValueError("sampling is for the identity loss: set identity_weight above 0, or leave sampling out")
        if self.sampling is not None and self.sampling.clips % self.loop.batch_size:
            wanted = f"a multiple of batch_size, {self.loop.batch_size}"
            raise ValueError(f"sampling.clips is {self.sampling.clips}; it must be {wanted}")
        return self


# Tab. 3: switches of `AdapterSettings`, by row. G trains as ours, without the image stage.
ABLATIONS: dict[str, dict[str, bool]] = {
    "ours": {},
    "A": dict(structure_branch=False),
    "B": dict(id_branch=False),
    "C": dict(face_modulation=False, can=False),
    "D": dict(can=False),
    "E": dict(face_modulation=False),
    "F": dict(face_modulation=False, can=False),
    "G": {},
}


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrainingConfig:
    """A whole run: which base, which adapter, which data, both stages."""

    base: str
    """`tiny`, a published name (`CogVideoX-5b`, ...) for the planner, or the folder of a diffusers model."""
    output: str
    """Folder that gets `image/` and `video/`, one run each."""
    width: Annotated[int, Field(ge=16, multiple_of=16)]
    height: Annotated[int, Field(ge=16, multiple_of=16)]
    image: StageConfig
    video: StageConfig
    id_encoder: str | None = None
    """`photomaker-v2.bin`; needed to precompute and to validate. `tiny` brings its own."""
    insightface_root: str = "~/.insightface"
    face_pack: str = "buffalo_l"
    """Its recogniser is the ID branch's eye, and the judge of the identity loss."""
    adapter: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Sizes that differ from the paper's, by the names of `AdapterConfig`."""
    ablation: Literal["ours", "A", "B", "C", "D", "E", "F", "G"] = "ours"
    """A row of the paper's Tab. 3."""
    fp8_base: bool = False
    """Store the frozen transformer's layers as 8-bit floats, as precision `fp8` does at inference; each is widened as
    it computes."""
    gradient_checkpointing: bool = False
    """Trade time for memory: each block runs again in the backward pass."""
    validation_people: CountOrNone = 4
    """The last people of the data: never trained on, made into clips and scored at each validation."""

    @model_validator(mode="after")
    def _check(self) -> TrainingConfig:
        if self.image.frames != 1:
            raise ValueError(f"image.frames is {self.image.frames}; the image stage trains on single pictures, 1")
        if self.video.frames % 8 != 1 or self.video.frames < 9:
            raise ValueError(f"video.frames is {self.video.frames}; it must be 8N + 1: 9, 17, ... 49")
        return self

    def stage(self, name: str) -> StageConfig:
        """`image` or `video`; raises SettingError for another name."""
        if name not in ("image", "video"):
            raise SettingError(f"The stage is {name!r}; choose image or video.")
        return self.image if name == "image" else self.video


def adapter_config(config: TrainingConfig, name: str, transformer: Mapping[str, Any]) -> AdapterConfig:
    """The adapter of a run: the paper's sizes, or tiny's own, with what the config says otherwise.

    name, transformer: of the base model. Raises SettingError for unknown sizes, or sizes that do not fit.
    """
    try:
        if name == TINY:
            return dataclasses.replace(tiny.ADAPTER, **config.adapter)
        return AdapterConfig.for_base(transformer, **config.adapter)
    except (TypeError, ValueError) as error:  # the dataclass's own words
        raise SettingError(f"The adapter sizes {dict(config.adapter)} do not fit {name}: {error}.") from error


def load_config(path: Path, overrides: Mapping[str, str] | None = None) -> TrainingConfig:
    """`settings_file.load_settings` of a run."""
    return load_settings(TrainingConfig, path, overrides)
