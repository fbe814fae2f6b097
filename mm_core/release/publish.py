"""An adapter in half precision with its model card and curve: a folder that is ready to be uploaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ..checkpoints.adapter_file import load_adapter, read_header, save_adapter
from ..data.features import Features
from ..errors import NumericsError
from ..files import is_current, write_text
from ..json_file import parse_object, read_object
from ..pipelines.presets import HUB_ADDRESS, published
from ..training.config import TrainingConfig
from ..training.runs import METRICS, latest_checkpoint
from ..training.sources import features_of, output_of

CARD, CURVE = "README.md", "curve.svg"
_SHOWN = ("noise_loss", "identity_loss", "validation/id_similarity")
_COLOURS = ("#1565c0", "#c62828", "#2e7d32")
_WIDTH, _HEIGHT, _MARGIN = 720, 200, 30


def export(config: TrainingConfig) -> Path:
    """The last checkpoint of the video stage as `output/adapter/magic-mirror-<base>.safetensors`, in half precision.

    Raises NumericsError for a weight beyond its range.
    """
    path, there = exported(config)
    if there:
        return path
    adapter, header = load_adapter(_last(config))
    half = adapter.to(torch.float16)
    beyond = [name for name, tensor in half.state_dict().items() if not tensor.isfinite().all()]
    if beyond:
        raise NumericsError(f"{', '.join(beyond[:5])} cannot be written in half precision: values beyond 65,504.")
    save_adapter(half, path, base_model=header.base_model, trained=header.trained)
    return path


def exported(config: TrainingConfig) -> tuple[Path, bool]:
    """Where `export` puts the adapter, and whether it is there: this run's, not that of one before in the folder."""
    last = _last(config)
    header = read_header(last)
    path = output_of(config) / "adapter" / f"magic-mirror-{header.base_model.split('/')[-1]}.safetensors"
    return path, is_current(path, last) and read_header(path) == header


def _last(config: TrainingConfig) -> Path:
    return latest_checkpoint(output_of(config) / "video") / "adapter.safetensors"


def write_card(config: TrainingConfig, adapter: Path, scores: Path) -> None:
    """`README.md` and `curve.svg` beside the adapter. scores: results.json of the evaluation."""
    header, preset = read_header(adapter), published(config.base)
    base = header.base_model if preset is None else preset.repo
    summary = read_object(scores)["summary"] or {"means": {}}
    summary = summary.pop("means") | summary
    stages = {name: output_of(config) / name for name in ("image", "video")}
    measured = {name: _metrics(folder / METRICS) for name, folder in stages.items() if (folder / METRICS).is_file()}
    lines = [
        *("---", "library_name: diffusers", "pipeline_tag: text-to-video", "license: other"),
        *([f"base_model: {base}"] if preset is not None else []),
        *("---", "", f"# Magic Mirror for {base}", "", f"{str(header.trained).capitalize()}.", ""),
        *("| what | which | licence |", "|---|---|---|"),
        f"| base model, frozen | {_link(base, preset is not None)} | its own |",
        "| ID encoder, frozen | PhotoMaker-V2's, or the base's own | its own |",
        f"| face models, for every photo too | insightface's {config.face_pack} | non-commercial research only |",
        *(_data_line(config, stage) for stage in measured),
        *("", "| stage | steps | samples a step | learning rate | seed |", "|---|---|---|---|---|"),
        *(_stage_line(config, stage) for stage in measured),
        *("", "People left out of training, one clip each, from its own caption:", "", "| score | mean |", "|---|---|"),
        *(f"| {name} | {value:.3f} |" for name, value in summary.items() if isinstance(value, float)),
        *("", f"![Losses over the steps]({CURVE})", ""),
    ]
    write_text(adapter.parent / CURVE, curve(measured))
    write_text(adapter.parent / CARD, "\n".join(lines))


def curve(measured: dict[str, list[dict[str, float]]]) -> str:
    """An <svg> of what each stage measured over its steps, each curve from its lowest to its highest value."""
    shapes = []
    for number, (stage, lines) in enumerate(measured.items()):
        top = number * _HEIGHT
        shapes.append(f'<text x="{_MARGIN}" y="{top + 18}">{stage}</text>')
        for place, name in enumerate(_SHOWN):
            points = [(line["step"], line[name]) for line in lines if name in line]
            if points:
                shapes.append(_polyline(points, top, _COLOURS[place]))
                low, high = min(y for _, y in points), max(y for _, y in points)
                words = f"{name} {low:.3g} to {high:.3g}"
                at = f'x="{_MARGIN + 80 + 210 * place}" y="{top + 18}"'
                shapes.append(f'<text {at} fill="{_COLOURS[place]}">{words}</text>')
    size = f'width="{_WIDTH}" height="{_HEIGHT * max(1, len(measured))}" font-size="12" font-family="sans-serif"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{"".join(shapes)}</svg>'


def _polyline(points: Sequence[tuple[float, float]], top: int, colour: str) -> str:
    steps, values = zip(*points)
    low, span, last = min(values), (max(values) - min(values)) or 1, max(steps)
    places = [
        f"{_MARGIN + (_WIDTH - 2 * _MARGIN) * step / last:.1f},"
        f"{top + _HEIGHT - _MARGIN - (_HEIGHT - 2 * _MARGIN) * (value - low) / span:.1f}"
        for step, value in points
    ]
    return f'<polyline points="{" ".join(places)}" fill="none" stroke="{colour}" stroke-width="1.5"/>'


def _metrics(path: Path) -> list[dict[str, float]]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [parse_object(line, f"A line of {path}") for line in lines]


def _data_line(config: TrainingConfig, stage: str) -> str:
    features = Features.open(features_of(config, stage))
    which = f"{features.counts['samples']:,} samples, {features.counts['references']:,} photos of people"
    return f"| data of the {stage} stage, {Path(config.stage(stage).data).name} | {which} | {features.licences} |"


def _stage_line(config: TrainingConfig, stage: str) -> str:
    loop = config.stage(stage).loop
    return f"| {stage} | {loop.steps:,} | {loop.batch_size} | {loop.learning_rate:g} | {loop.seed} |"


def _link(base: str, published: bool) -> str:
    return f"[{base}]({HUB_ADDRESS}/{base})" if published else base
