"""What a training run of the adapter is: dataclasses, read strictly from YAML (`configs/` has the paper's recipe)."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..errors import SettingError, reason
from ..limits import CONFIG_BYTES
from ..models.config import AdapterConfig
from ..pipelines import tiny
from .loop_config import LoopConfig


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the model samples the clips that its identity loss then judges: DDIM, as validation and inference do."""

    clips: int
    """In the making at a time, a multiple of `batch_size`; each step of training takes the next batch of them a step
    further. Many: a clip that comes up again soon is learnt by heart."""
    steps: int = 25
    guidance: float = 6.0
    """Of the classifier-free guidance; what is judged is the guided x0, which is what a user sees."""
    clean_weight: float = 0.0
    """Of the squared difference between the mean frames of the guided x0 and of the training clip, which has the same
    prompt and person: what a recogniser does not see of them. 0 is off."""
    clean_from: int = 300
    """Noise level from which on that acts: below, a sampled clip has gone its own way."""
    motion_from: int = 0
    """Noise level from which on `motion_weight` is whole. The base's motion is that of another face: where the person's
    is drawn, the latents cannot have both."""
    motion_below: float = 0.0
    """Part of it below."""

    def __post_init__(self) -> None:
        if self.clips < 1:
            raise SettingError(f"sampling.clips is {self.clips}; it must be a multiple of batch_size.")
        if not 1 <= self.steps <= 1000:
            raise SettingError(f"sampling.steps is {self.steps}; it must be from 1 to 1000.")
        if not self.guidance >= 1:
            raise SettingError(f"sampling.guidance is {self.guidance}; it must be 1 (off) or more.")
        for name in ("clean_weight", "motion_below"):
            if not vars(self)[name] >= 0:
                raise SettingError(f"sampling.{name} is {vars(self)[name]}; it must be 0 (off) or more.")
        for name in ("clean_from", "motion_from"):
            if not 0 <= vars(self)[name] <= 1000:
                raise SettingError(f"sampling.{name} is {vars(self)[name]}; it must be a noise level, 0 to 1000.")


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One of the two stages: `image`, single pictures, or `video` (paper Sec. 3.4)."""

    data: str
    """Folder of the dataset, `manifest.jsonl` and what it names, or another manifest in it (docs/training.md)."""
    features: str
    """Folder of what the frozen models make of it, once; may be on a faster disk."""
    frames: int
    """Of each clip; 1 for pictures, else 8N + 1 (CogVideoX 1.0) or 16N + 1 (1.5)."""
    loop: LoopConfig
    text_dropout: float = 0.1
    """Part of the samples whose prompt is the empty one: the identity alone is seen."""
    identity_dropout: float = 0.1
    """Part of the samples that run as the plain base model. It has nothing to learn there: their loss is the base's
    own, logged as `base_loss` beside the adapter's."""
    both_dropout: float = 0.0
    """Part of the samples with neither."""
    max_references: int = 1
    """Photos of the person that a sample sees: 1 to so many, drawn anew each time."""
    face_area: float = 0.5
    """Part of the samples whose noise loss is averaged over the face's area only."""
    identity_weight: float = 0.0
    """lambda of the identity loss; 0 switches it off, and nothing of it is then loaded or computed."""
    identity_start: int = 0
    """Step from which on it acts."""
    identity_timesteps: tuple[int, int] = (0, 500)
    """Noise levels at which it acts, first included, last excluded: at high noise `x0` is a blur without a face."""
    identity_centred: bool = False
    """Take its cosine from the mean embedding of all photos. Faces of one kind, such as drawn ones, share much of
    theirs; what is left tells people apart. False is the paper's."""
    motion_weight: float = 0.0
    """Of the share of a clip's motion that x0 has wrong, at all noise levels; in clips that the model samples itself,
    of the motion that the base alone would give them, both guided. 0 is the paper's."""
    motion_windows: tuple[tuple[int, ...], ...] = ()
    """Parts of the latents, each from one row to another and from one column to another, whose own motion is judged as
    well: eyes and mouths, where a data set has them all in one place, move little beside a head."""
    sampling: SamplingConfig | None = None
    """Judge clips that the model samples itself, one beside each sample; None: the noised samples, as in the paper."""

    def __post_init__(self) -> None:
        for name in ("text_dropout", "identity_dropout", "both_dropout", "face_area"):
            if not 0 <= vars(self)[name] <= 1:
                raise SettingError(f"{name} is {vars(self)[name]}; it must be from 0 to 1.")
        if self.text_dropout + self.identity_dropout + self.both_dropout >= 1:
            raise SettingError("text_dropout, identity_dropout and both_dropout together must be below 1.")
        if self.max_references < 1:
            raise SettingError(f"max_references is {self.max_references}; it must be 1 or more.")
        for name in ("identity_weight", "motion_weight"):
            if not vars(self)[name] >= 0:
                raise SettingError(f"{name} is {vars(self)[name]}; it must be 0 (off) or more.")
        for window in self.motion_windows:
            if len(window) != 4 or not (0 <= window[0] < window[1] and 0 <= window[2] < window[3]):
                wanted = "each must be two rows and two columns, rising: [2, 7, 3, 13]"
                raise SettingError(f"motion_windows holds {list(window)}; {wanted}.")
        levels = tuple(self.identity_timesteps)
        if len(levels) != 2 or not 0 <= levels[0] < levels[1] <= 1000:
            shown = ", ".join(map(str, levels[:4]))
            raise SettingError(f"identity_timesteps is {shown}; it must be two numbers rising within 0 to 1000.")
        object.__setattr__(self, "identity_timesteps", levels)
        if self.sampling is not None and not self.identity_weight:
            raise SettingError("sampling is for the identity loss: set identity_weight above 0, or leave sampling out.")
        if self.sampling is not None and self.sampling.clips % self.loop.batch_size:
            raise SettingError(
                f"sampling.clips is {self.sampling.clips}; it must be a multiple of batch_size, {self.loop.batch_size}."
            )


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """A whole run: which base, which adapter, which data, both stages."""

    base: str
    """`tiny`, a published name (`CogVideoX-5b`, ...) for the planner, or the folder of a diffusers model."""
    output: str
    """Folder that gets `image/` and `video/`, one run each."""
    width: int
    height: int
    image: StageConfig
    video: StageConfig
    id_encoder: str | None = None
    """`photomaker-v2.bin`; needed to precompute and to validate. `tiny` brings its own."""
    insightface_root: str = "~/.insightface"
    face_pack: str = "buffalo_l"
    """Its recogniser is the ID branch's eye, and the judge of the identity loss."""
    adapter: Mapping[str, int] = field(default_factory=dict)
    """Sizes that differ from the paper's, by the names of `AdapterConfig`."""
    ablation: str = "ours"
    """A row of the paper's Tab. 3: ours, or A to G."""
    gradient_checkpointing: bool = False
    """Trade time for memory: each block runs again in the backward pass."""
    validation_people: int = 4
    """The last people of the data: never trained on, made into clips and scored at each validation."""

    def __post_init__(self) -> None:
        if self.ablation not in ABLATIONS:
            raise SettingError(f"ablation is {self.ablation!r}; choose one of {', '.join(ABLATIONS)}.")
        for name in ("width", "height"):
            if vars(self)[name] < 16 or vars(self)[name] % 16:
                raise SettingError(f"{name} is {vars(self)[name]} px; it must be a multiple of 16.")
        if self.image.frames != 1:
            raise SettingError(f"image.frames is {self.image.frames}; the image stage trains on single pictures, 1.")
        if self.video.frames % 8 != 1 or self.video.frames < 9:
            raise SettingError(f"video.frames is {self.video.frames}; it must be 8N + 1: 9, 17, ... 49.")

    def stage(self, name: str) -> StageConfig:
        """`image` or `video`; raises SettingError for another name."""
        if name not in ("image", "video"):
            raise SettingError(f"The stage is {name!r}; choose image or video.")
        return self.image if name == "image" else self.video


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


def adapter_config(config: TrainingConfig, name: str, transformer: Mapping[str, Any]) -> AdapterConfig:
    """The adapter of a run: the paper's sizes, or tiny's own, with what the config says otherwise.

    name, transformer: of the base model. Raises SettingError for unknown sizes, or sizes that do not fit.
    """
    try:
        if name == tiny.NAME:
            return dataclasses.replace(tiny.ADAPTER, **config.adapter)
        return AdapterConfig.for_base(transformer, **config.adapter)
    except (TypeError, ValueError) as error:  # the dataclass's own words
        raise SettingError(f"The adapter sizes {dict(config.adapter)} do not fit {name}: {error}.") from error


def load_config(path: Path, overrides: Mapping[str, str] | None = None) -> TrainingConfig:
    """Read a YAML file. overrides: values by dotted name, `{"video.loop.steps": "100"}`, as on the command line.

    Raises SettingError for a missing file, an unknown or missing name, or a value of another type or out of its range.
    """
    try:
        if path.stat().st_size > CONFIG_BYTES:
            raise SettingError(f"The config {path} has more than {CONFIG_BYTES:,} bytes, which no config has.")
        content = _parse(path.read_text(encoding="utf-8"), f"The config {path}")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError(f"The config {path} cannot be read: {reason(error)}. Give a YAML file.") from error
    for name, text in (overrides or {}).items():
        *parents, last = name.split(".")
        place = content
        for parent in parents:
            place = place.setdefault(parent, {}) if isinstance(place, dict) else None
        if not isinstance(place, dict):
            raise SettingError(f"{name} cannot be set: {'.'.join(parents)} is not a group of settings.")
        place[last] = _parse(text, f"The value of {name}")
    return build(TrainingConfig, content, path.name)


class _Loader(yaml.SafeLoader):
    """YAML without aliases, which a few lines of can unpack to gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it uses an alias (*), which is not taken; write the value out")
        return super().compose_node(parent, index)


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError as error:
        raise SettingError(f"{where} cannot be read: it is nested too deeply.") from error
    except (yaml.YAMLError, ValueError) as error:
        raise SettingError(f"{where} cannot be read: {error}.") from error


def build(cls: type, content: Any, where: str) -> Any:
    """A dataclass from plain YAML values, strictly."""
    if not isinstance(content, dict):
        raise SettingError(f"{where} must be a group of settings, not {str(content)[:100]}.")
    hints = typing.get_type_hints(cls)
    required = {
        f.name for f in dataclasses.fields(cls)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }  # fmt: skip
    unknown, missing = sorted(map(str, content.keys() - hints.keys())), sorted(required - content.keys())
    wrong = [f"{what} {', '.join(names)}" for what, names in (("unknown", unknown), ("missing", missing)) if names]
    if wrong:
        raise SettingError(f"{where}: {'; '.join(wrong)}. Its settings are {', '.join(hints)}.")
    return cls(**{name: _value(hints[name], value, f"{where}: {name}") for name, value in content.items()})


def _value(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return build(hint, value, where)
    if isinstance(hint, types.UnionType):
        return None if value is None else _value(typing.get_args(hint)[0], value, where)
    origin = typing.get_origin(hint) or hint
    if origin is str and value is False:  # YAML reads a bare `no` as false
        return "no"
    if origin is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if not -1e300 < value < 1e300:
            raise SettingError(f"{where} is {str(value)[:100]}; it must be a finite number.")
        return float(value)
    if origin is float and isinstance(value, str):  # YAML reads 1e-5, without a point, as text
        try:
            return float(value)
        except ValueError:
            pass
    if origin is tuple and isinstance(value, (list, tuple)):
        kinds = typing.get_args(hint)
        return tuple(_value(kinds[0], item, where) for item in value)
    if origin in (Mapping, dict) or getattr(origin, "__name__", "") == "Mapping":
        if isinstance(value, dict):
            return value
    elif type(value) is origin:
        return value
    raise SettingError(f"{where} is {str(value)[:100]!r}; it must be of type {getattr(hint, '__name__', hint)}.")
