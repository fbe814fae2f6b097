"""`python -m mm_core.training`: from a folder of clips and a config to an adapter.

    plan         what a run needs: parameters, FLOPs, memory, GPU hours
    rehearse     a few steps at real sizes with random weights: what a run takes on this machine
    fetch        base model, ID encoder and face pack, with your consent
    check        what is wrong with a stage's dataset
    precompute   what the frozen models make of it, once
    image        stage 1, on single pictures
    video        stage 2, on clips, from the result of stage 1
    train        all of it, then an adapter to publish and its scores

Interrupted commands go on where they stopped when they are given again.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import tempfile
from pathlib import Path

from ..errors import exit_code
from ..progress import bars
from ..settings_file import parse_setting
from ..training.config import TrainingConfig, load_config

STAGES = ("image", "video")


def main(argv: list[str] | None = None) -> int:
    """Return the exit code: 0, 1 for a dataset with faults, 2 for a mistake of the user's, 130 when interrupted."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return exit_code(lambda: _run(args), "stopped; the same command goes on from the last checkpoint")


def _run(args: argparse.Namespace) -> int | None:
    _take_device()
    config = load_config(args.config, dict(parse_setting(text) for text in args.set))
    return args.run(config, args)


def plan(config: TrainingConfig, args: argparse.Namespace) -> None:
    """Print what the run needs; nothing is loaded."""
    from ..planning.plan import plan as make_plan

    print(make_plan(config))


def fetch(config: TrainingConfig, args: argparse.Namespace) -> None:
    """Fetch base model, ID encoder and face pack, as far as they are missing."""
    from .fetch import fetch as fetch_parts

    for path in fetch_parts(config, args.accept_licences):
        print(path)


def check(config: TrainingConfig, args: argparse.Namespace) -> int:
    """Print what is wrong with the datasets of both stages."""
    from .prepare import check as check_stage

    reports = []
    for stage in args.stage or STAGES:
        with bars() as on_progress:
            report = check_stage(config, stage, lambda done, of: on_progress("samples", done, of))
        reports.append(report)
        print(report)
    return int(any(report.problems for report in reports))


def precompute(config: TrainingConfig, args: argparse.Namespace) -> None:
    """Write the features of one stage, or of both; with several processes, this one's share of them."""
    from ..data.features import Features
    from ..data.precompute import precompute as make_features
    from ..training.sources import features_of
    from .prepare import feature_settings

    for stage in args.stage or STAGES:
        folder = features_of(config, stage)
        with bars(quiet=args.rank > 0) as on_progress:
            whole = make_features(
                feature_settings(config, stage), folder, on_progress, rank=args.rank, world_size=args.world_size
            )
        if whole:
            print(folder, json.dumps(Features.open(folder).counts))


def train_one(config: TrainingConfig, args: argparse.Namespace) -> None:
    """Train one stage."""
    from ..training.adapter_task import train_stage

    print(train_stage(config, args.command, args.start))
    _leave()


def train_all(config: TrainingConfig, args: argparse.Namespace) -> None:
    """Check, precompute, train both stages, export and score: what is finished is skipped."""
    from .whole import train_whole

    with bars(quiet=args.rank > 0) as on_progress:

        def show(stage: str, what: str, done: int, of: int) -> None:
            on_progress(f"{stage}: {what}", done, of)

        print(train_whole(config, args.rank, args.world_size, show))
    _leave()


def rehearse(config: TrainingConfig, args: argparse.Namespace) -> None:
    """Real sizes, random weights, a few steps of each stage: seconds, memory and hours beside the planner's."""
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list, parse_flag_from_env

    from ..planning.rehearse import rehearse as run

    processes = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))  # as the loop's Accelerator takes it
    with tempfile.TemporaryDirectory(dir=args.folder) as own:
        folder = broadcast_object_list([own])[0]  # the first process's
        table = run(config, args.steps, Path(folder), args.price_per_hour)
        processes.wait_for_everyone()
    if processes.is_main_process:
        print(table)
    _leave()


def _take_device() -> None:
    """Take this process's GPU of several: to precompute, nothing else chooses one."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.getenv("LOCAL_RANK", "0")))


def _leave() -> None:
    """Take leave of the other processes."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mm_core.training", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    runs = {
        "plan": plan, "fetch": fetch, "check": check, "precompute": precompute, "image": train_one,
        "video": train_one, "train": train_all, "rehearse": rehearse,
    }  # fmt: skip
    for name, run in runs.items():
        command = commands.add_parser(name, help=run.__doc__.splitlines()[0])
        command.set_defaults(run=run)
        command.add_argument("--config", type=Path, required=True, help="a YAML file, see mm_core/training/configs")
        command.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="replace settings")
        if run is fetch:
            command.add_argument("--accept-licences", action="store_true", help="of what is fetched")
        if run in (check, precompute):
            command.add_argument("--stage", nargs="*", choices=STAGES, help="default: both")
        if run in (precompute, train_all):  # torchrun tells them, and what starts processes otherwise gives them
            command.add_argument("--rank", type=int, default=int(os.getenv("RANK", 0)), help="of this process")
            command.add_argument("--world-size", type=int, default=int(os.getenv("WORLD_SIZE", 1)), help="of all")
        if run is rehearse:
            command.add_argument("--steps", type=int, default=20, help="of each stage, before and after a resume")
            command.add_argument("--folder", type=Path, help="for its files, which are removed again")
            command.add_argument("--price-per-hour", type=float, help="of one device, to be told what the run costs")
        if run is train_one:
            command.add_argument("--start", type=Path, help="adapter to begin with")
    return parser
