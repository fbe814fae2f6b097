"""How small CAN may be: the shipped adapter with a new CAN of each size, trained alike, all other weights frozen.

Every CAN begins as none (its last layer is zero) and sees the same pictures with the same noise, in the image stage
with the identity loss. People that no training saw then tell what it learnt: the noise loss and the identity loss of
their pictures, with the same noise for all, and the likeness of pictures that are sampled of them, by dlib and SFace.
What is finished is kept: the same command goes on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tqdm import tqdm

from mm_core.checkpoints.adapter_file import Trained, load_adapter, save_adapter
from mm_core.choices import TINY
from mm_core.data.precompute import precompute
from mm_core.evaluation.recognisers import find_face, other_judges
from mm_core.faces.analysis import FaceAnalyzer
from mm_core.files import write_json
from mm_core.models.adapter import MagicMirrorAdapter
from mm_core.pipelines.base import TinyBase
from mm_core.release.prepare import feature_settings
from mm_core.training import validation
from mm_core.training.adapter_task import train_stage
from mm_core.training.config import TrainingConfig, load_config
from mm_core.training.sample_losses import Pass, decode_frame
from mm_core.training.sources import features_of
from mm_core.video_reader import read_frames
from scripts import environment

from ..people.manifest import write_manifest
from ..people.shards import RenderSettings, render_dataset
from .__main__ import CONFIG
from .adapter import TinyTask
from .score import GUIDANCE, STEPS

PEOPLE, CLIPS, HELD_OUT = range(1600, 1760), 4, 24
"""None of them seen by the shipped weights; the last ones are measured, the others train."""
LEVELS = (300, 400, 500, 600, 700, 800)
"""Noise levels of the measured pictures; the identity loss acts on all but the last."""
SHIPPED, NONE = "shipped", "none"
"""The rows that need no training: the adapter as it ships, and without CAN, which is what all begin as."""
COSINES = "cosines.json"
DRAWS = 10_000
_NO_MEASURES = ("row", "parameters")


class CanTask(TinyTask):
    """The image stage, of CAN alone."""

    def __init__(self, config: TrainingConfig, stage: str, start: Path) -> None:
        super().__init__(config, stage, start)
        for name, parameter in self.model.adapter.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and ".can." in name)

    @torch.no_grad()
    def picture(self, row: int) -> np.ndarray:
        """(H, W, 3) uint8: a picture of the data through the VAE, as sampled ones are."""
        frame = decode_frame(self.pipe.vae, self.features.sample(row)["latents"].float()[None])[0]
        return (frame.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()

    @torch.no_grad()
    def measure(self) -> dict[str, list[float]]:
        """The mean of each loss of the pictures of each person who is left out of training."""
        people: dict[str, dict[str, list[float]]] = {}
        for row in tqdm(self.validation[::2].tolist(), desc="held out", unit="picture"):  # two pictures of each
            drawn = []
            for place, level in enumerate(LEVELS):
                sample = self.draw(row, row * len(LEVELS) + place, whole=True)
                drawn.append(sample | {"timestep": torch.tensor(level), "alpha_bar": self.alphas_bar[level]})
            batch = self.stacked(drawn) | self._judged(drawn)
            passed = Pass(batch=batch, prediction=self.model.predict(batch, *self.model.identity(batch)))
            values = people.setdefault(self.features.entries[row]["person"], {})
            for loss in self.model.losses:
                values.setdefault(loss.name, []).extend(loss(passed)[1].tolist())
        names = next(iter(people.values()))
        return {name: [float(np.mean(values[name])) for values in people.values()] for name in names}


def main() -> None:
    args = _parse()
    torch.set_num_threads(1)
    config = prepared(args)
    rows = [SHIPPED, NONE, *args.sizes]
    for seed in range(args.seeds):
        for row in rows if seed == 0 else args.sizes:
            measure_row(config, row, seed, args)
    likeness = None
    for row in rows:
        if not (args.folder / name_of(row, 0) / COSINES).is_file():
            task = task_of(config, row, 0, args)
            likeness = likeness or Likeness(task)
            score_row(likeness, task, args.folder / name_of(row, 0))
    report = [entries(row, args) for row in rows]
    write_json(args.folder / "can_sizes.json", {"rows": report})
    print(table(report))
    plot(report, args.plot)
    print(args.plot)


def prepared(args: argparse.Namespace) -> TrainingConfig:
    """The run's settings, with its data made."""
    people = args.folder / "people"
    render_dataset(people, RenderSettings(first=PEOPLE.start, stop=PEOPLE.stop, clips=CLIPS), 1)
    if not (people / "images.jsonl").is_file():
        write_manifest(people, "images.jsonl", pictures=True)
    settings = {
        "base": TINY, "id_encoder": TinyBase().id_encoder, "insightface_root": environment.face_models(),
        "image.data": people / "images.jsonl", "image.features": args.folder / "features",
        "validation_people": HELD_OUT, "image.identity_start": 0, "image.loop.validate_every": 0,
        "image.loop.compile": "false", "image.loop.steps": args.steps, "image.loop.batch_size": args.batch_size,
        "image.loop.learning_rate": args.learning_rate, "image.loop.final_learning_rate": args.learning_rate / 20,
        "image.loop.warmup_steps": args.steps // 20, "image.loop.ema_decay": 0.98, "image.loop.save_every": 20,
        "image.loop.keep": 1, "image.loop.log_every": 5,
    }  # fmt: skip
    config = load_config(CONFIG, {name: str(value) for name, value in settings.items()})
    precompute(feature_settings(config, "image"), features_of(config, "image"), lambda *_: None)
    return config


def name_of(row: str, seed: int) -> str:
    return row if row in (SHIPPED, NONE) else f"can-{row}-seed-{seed}"


def adapter_of(config: TrainingConfig, row: str, seed: int, folder: Path) -> Path:
    """The row's adapter file, trained if it is to be."""
    if row in (SHIPPED, NONE):
        return TinyBase().adapter
    start = folder / "start.safetensors"
    if not start.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        adapter, trained = with_new_can(TinyBase().adapter, int(row), seed)
        save_adapter(adapter, start, base_model=TINY, trained=trained)
    image = replace(config.image, loop=replace(config.image.loop, seed=seed))
    return train_stage(replace(config, image=image, output=str(folder)), "image", start, CanTask)


def with_new_can(path: Path, hidden: int, seed: int) -> tuple[MagicMirrorAdapter, Trained]:
    """An adapter whose CAN is new, of this size; all else, and what it was trained on, is the file's."""
    known, header = load_adapter(path)
    torch.manual_seed(seed)
    adapter = MagicMirrorAdapter(replace(header.config, can_hidden_dim=hidden))
    kept = {name: tensor for name, tensor in known.state_dict().items() if ".can." not in name}
    adapter.load_state_dict(adapter.state_dict() | kept)
    return adapter, header.trained


def measure_row(config: TrainingConfig, row: str, seed: int, args: argparse.Namespace) -> None:
    """Write the losses of the people left out of training."""
    file = args.folder / name_of(row, seed) / "losses.json"
    if file.is_file():
        return
    task = task_of(config, row, seed, args)
    sizes = {name: parameter.numel() for name, parameter in task.model.adapter.named_parameters()}
    can = sum(size for name, size in sizes.items() if ".can." in name)
    parameters = {"can": 0 if row == NONE else can, "adapter": sum(sizes.values()) - (can if row == NONE else 0)}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {"parameters": parameters, "losses": task.measure()})


def task_of(config: TrainingConfig, row: str, seed: int, args: argparse.Namespace) -> CanTask:
    """The row's adapter as a task, trained if it is to be."""
    adapter = adapter_of(config, row, seed, args.folder / name_of(row, seed))
    return CanTask(replace(config, ablation="D" if row == NONE else "ours"), "image", adapter)


class Likeness:
    """To the people left out of training: the cosine by each recogniser, from the mean of these people.

    task: any row's; a person is known by the pictures of the data, through the VAE as sampled ones are.
    """

    def __init__(self, task: CanTask) -> None:
        self.analyzer = FaceAnalyzer(environment.face_models(), task.config.face_pack, device="cpu")
        self.judges = other_judges()
        people: dict[str, list[dict[str, np.ndarray]]] = {}
        for row in tqdm(task.validation.tolist(), desc="known people", unit="picture"):
            people.setdefault(task.features.entries[row]["person"], []).append(self.look(task.picture(row)))
        self.known = {
            judge.name: np.stack([np.mean([e[judge.name] for e in seen if e], axis=0) for seen in people.values()])
            for judge in self.judges
        }

    def look(self, picture: np.ndarray) -> dict[str, np.ndarray]:
        """Embeddings of length 1, by recogniser; none without a face."""
        seen = find_face(self.analyzer, picture)
        vectors = {} if seen is None else {judge.name: judge.describe(*seen) for judge in self.judges}
        return {name: vector / np.linalg.norm(vector) for name, vector in vectors.items()}

    def cosines(self, pictures: Sequence[np.ndarray]) -> dict[str, list[float]]:
        """Of one picture of each person; 0 without a face."""
        found = [self.look(picture) for picture in tqdm(pictures, desc="sampled", unit="picture")]
        values = {}
        for name, known in self.known.items():
            centre = known.mean(axis=0)
            pairs = zip(found, known - centre, strict=True)
            values[name] = [_cosine(e[name] - centre, person) if e else 0.0 for e, person in pairs]
        return values


def score_row(likeness: Likeness, task: CanTask, folder: Path) -> None:
    """Sample a picture of each person left out, as a validation does, and write how alike it is."""
    validation.STEPS, validation.GUIDANCE = STEPS, GUIDANCE
    pictures = folder / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    task.validate(0, pictures)
    drawn = [next(read_frames(path)) for path in sorted(pictures.glob("*.mp4"))]
    write_json(folder / COSINES, likeness.cosines(drawn))


def _cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


def entries(row: str, args: argparse.Namespace) -> dict[str, Any]:
    """What was measured of a row: parameters, and of each measure the values of people, one list a seed."""
    seeds = range(1 if row in (SHIPPED, NONE) else args.seeds)
    runs = [json.loads((args.folder / name_of(row, seed) / "losses.json").read_text("utf-8")) for seed in seeds]
    cosines = json.loads((args.folder / name_of(row, 0) / COSINES).read_text("utf-8"))
    measures = {name: [run["losses"][name] for run in runs] for name in runs[0]["losses"]}
    return {"row": row, "parameters": runs[0]["parameters"]} | measures | {name: [v] for name, v in cosines.items()}


def table(report: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: means over people, and in brackets how much more than the largest size, with its 95% interval."""
    measures = [name for name in report[0] if name not in _NO_MEASURES]
    largest = max(report[2:], key=lambda entry: entry["parameters"]["can"])
    lines = [f"| CAN | its parameters | of the adapter | {' | '.join(measures)} |", "|---" * (3 + len(measures)) + "|"]
    for entry in report:
        can, adapter = entry["parameters"]["can"], entry["parameters"]["adapter"]
        cells = [cell(entry[name], largest[name], entry is largest) for name in measures]
        lines.append(f"| {entry['row']} | {can:,} | {can / adapter:.0%} of {adapter:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(values: Sequence[Sequence[float]], largest: Sequence[Sequence[float]], itself: bool) -> str:
    mean = np.mean(values)
    if itself:
        return f"{mean:.4f}"
    low, high = interval(np.mean(values, axis=0) - np.mean(largest, axis=0))
    return f"{mean:.4f} ({low:+.4f} to {high:+.4f})"


def interval(values: np.ndarray) -> tuple[float, float]:
    """95% of the means of people drawn anew (bootstrap)."""
    drawn = np.random.default_rng(0).integers(len(values), size=(DRAWS, len(values)))
    low, high = np.percentile(values[drawn].mean(axis=1), (2.5, 97.5))
    return float(low), float(high)


def plot(report: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Likeness and noise loss over the adapter's parameters; bars are the interval of the difference to the largest."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    trained = sorted(report[1:], key=lambda entry: entry["parameters"]["can"])
    measures = [name for name in trained[0] if name not in _NO_MEASURES]
    for axes, names in ((left, measures[1:]), (right, measures[:1])):  # the noise loss is the first
        for name in names:
            curve(axes, trained, report[0], name)
        for entry in trained:
            place = entry["parameters"]["adapter"] / 1e6
            axes.annotate(entry["row"], (place, 1), xycoords=("data", "axes fraction"), ha="center", va="bottom")
        axes.set_xlabel("million parameters; above: CAN's hidden size")
        axes.legend(fontsize="small")
    left.set_ylabel("cosine, people not trained on")
    figure.savefig(path, dpi=100)


def curve(axes: Axes, trained: Sequence[Mapping[str, Any]], shipped: Mapping[str, Any], name: str) -> None:
    """One measure; the identity loss as the cosine that it is of. Dotted: the adapter as it ships."""
    sign, offset, label = (-1, 1, "ArcFace, x0 of pictures") if name == "identity_loss" else (1, 0, name)
    people = [offset + sign * np.mean(entry[name], axis=0) for entry in trained]
    means = np.array([values.mean() for values in people])
    bounds = np.array([interval(values - people[-1]) for values in people]) + means[-1]
    x = [entry["parameters"]["adapter"] / 1e6 for entry in trained]
    (line, *_) = axes.errorbar(x, means, np.abs(bounds.T - means), marker="o", capsize=3, label=label)
    axes.axhline(offset + sign * np.mean(shipped[name]), color=line.get_color(), linestyle=":", linewidth=1)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/can"), help="of everything that is made")
    parser.add_argument("--sizes", nargs="+", default=["128", "16", "32", "64"], help="of can_hidden_dim")
    parser.add_argument("--seeds", type=int, default=1, help="trainings of each size")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--plot", type=Path, default=Path("docs/can_sizes.png"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
