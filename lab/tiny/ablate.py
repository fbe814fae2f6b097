"""The paper's ablations (Tab. 3) on the small model, each trained anew, and convergence with and without CAN (Fig. 12).

Every row runs both stages of tiny.yaml, shortened by --steps, on the base and features of a finished run of
`python -m lab.tiny`, and is scored on held-out people as `python -m lab.tiny.score` does. Finished rows and their
scores are kept: the same command goes on, and several processes may each take some --rows.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
from matplotlib.figure import Figure

from mm_core.files import write_json
from mm_core.pipelines.base import FolderBase
from mm_core.pipelines.control import AdapterSettings
from mm_core.pipelines.magic_mirror import MagicMirror
from mm_core.training.adapter_task import train_stage
from mm_core.training.config import ABLATIONS, StageConfig, TrainingConfig
from mm_core.training.runs import METRICS
from scripts import environment

from .__main__ import Recipe
from .adapter import TinyTask
from .score import GUIDANCE, Scorer, score_generated, tables

CURVES = {"ours": "with CAN", "C": "without CAN"}
SAME = {"F": "C"}  # the paper's two rows without any modulation: one training here


def main() -> None:
    args = _parse()
    recipe = Recipe(args.folder, environment.face_models(), {})
    scorer = Scorer(args.people)
    out, report = args.folder / "ablations", {}
    for row in args.rows:
        trained = SAME.get(row, row)
        adapter = train_row(recipe.config, trained, args)  # refuses what was trained for other --steps
        scores = out / trained / f"scores-people{args.people}-steps{args.sampling_steps}-guidance{args.guidance:g}.json"
        if not scores.is_file():
            base = FolderBase(Path(recipe.config.base))
            encoder = Path(recipe.config.id_encoder)
            mirror = MagicMirror(base, adapter=adapter, id_encoder=encoder, device=torch.device("cpu"))
            settings = AdapterSettings(**ABLATIONS[trained])
            score_generated(scorer, trained, mirror, settings, args.sampling_steps, args.guidance)
            write_json(scores, scorer.report()[trained])
        report[row] = json.loads(scores.read_text(encoding="utf-8"))
    write_json(out / "ablations.json", report)
    print(tables(report))
    curves = {row: curve(out / row / "image" / METRICS) for row in CURVES if row in report}
    if curves:
        plot(curves, out / "convergence.png")
    print(out)


def train_row(config: TrainingConfig, row: str, args: argparse.Namespace) -> Path:
    """Both stages, or the second alone for G, which gets the first one's steps as well."""
    image = _shortened(config.image, args.steps, max(1, args.steps // 5) if row in CURVES else 0)
    video = _shortened(config.video, args.steps // 2 + (args.steps if row == "G" else 0), 0)
    folder = args.folder / "ablations" / row
    config = replace(config, ablation=row, output=str(folder), image=image, video=video)
    if row != "G":
        train_stage(config, "image", task=TinyTask)
    return train_stage(config, "video", task=TinyTask)


def _shortened(stage: StageConfig, steps: int, validate_every: int) -> StageConfig:
    """The identity loss begins as early in it as in the whole stage, and the warm-up is as short."""
    start, warmup = (whole * steps // stage.loop.steps for whole in (stage.identity_start, stage.loop.warmup_steps))
    loop = replace(
        stage.loop, steps=steps, warmup_steps=warmup, validate_every=validate_every, save_every=max(1, steps // 5)
    )
    return replace(stage, identity_start=start, loop=loop)


def curve(metrics: Path) -> list[tuple[int, float]]:
    """(step, identity similarity) of each validation."""
    name = "validation/id_similarity"
    lines = map(json.loads, metrics.read_text(encoding="utf-8").splitlines())
    return [(line["step"], line[name]) for line in lines if name in line]


def plot(curves: dict[str, list[tuple[int, float]]], path: Path) -> None:
    """Identity similarity of validation clips over the steps of the image stage."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for row, points in curves.items():
        axes.plot(*zip(*points), label=CURVES[row])
    axes.set(xlabel="step of the image stage", ylabel="identity similarity")
    axes.legend()
    figure.savefig(path, dpi=100)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/tiny"), help="of a finished run of the small model")
    parser.add_argument("--rows", nargs="+", choices=list(ABLATIONS), default=list(ABLATIONS))
    parser.add_argument("--steps", type=int, default=1500, help="of the image stage; the video stage has half as many")
    parser.add_argument("--people", type=int, default=50)
    parser.add_argument("--sampling-steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    return parser.parse_args()


if __name__ == "__main__":
    main()
