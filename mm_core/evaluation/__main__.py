"""`python -m mm_core.evaluation`: how well clips keep a person, and how well systems that make them compare.

    score       measure a folder of clips against reference photos
    set         make a benchmark of a folder of people: photos and prompts
    benchmark   make one system's clips of a set, score them, and compare all systems so far
    export      a system's clips under the names that VBench or OpenS2V-Eval look for
    factors     a picture of an adapter's scale factors, by modality, layer and time step
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..choices import EXPORTS, SYSTEMS
from ..errors import MagicMirrorError, SettingError, exit_code
from ..faces.packs import INSIGHTFACE
from ..faces.references import MIN_SAME_PERSON


def main(argv: list[str] | None = None) -> int:
    """Return the exit code: 0, 1 if some videos could not be measured, 2 for a mistake of the user, 130 interrupted."""
    args = _parser().parse_args(argv)
    return exit_code(lambda: args.run(args))


def score(args: argparse.Namespace) -> int:
    """Measure a folder of clips against reference photos. Returns 1 if some could not be measured."""
    return _measure(args, _judging(args), args.videos, args.references, args.out)


def make_set(args: argparse.Namespace) -> int:
    """Make a benchmark of a folder of people: photos and prompts."""
    from .benchmark_set import build_set

    entries = build_set(_analyzer(args), args.people, args.out, args.number)
    print(f"{args.out}: {len({entry.person for entry in entries})} people, {len(entries)} clips to make")
    return 0


def benchmark(args: argparse.Namespace) -> int:
    """Make one system's clips of a set, score them, and compare all systems so far. Returns as score."""
    import torch
    from accelerate import PartialState

    from ..checkpoints.adapter_file import read_header
    from .benchmark_set import read_set
    from .generate import VIDEOS, check_run, clip_of, generate
    from .systems import LOADERS, Size, Weights
    from .tables import RESULTS, write_tables

    if not re.fullmatch(r"\w[\w .'-]*", args.system):
        raise SettingError(f"The system is {args.system!r}; it must be a folder's name, such as {SYSTEMS[0]}")
    out, entries, trained = args.out / args.system, read_set(args.set), None
    processes = PartialState(cpu=not torch.accelerator.is_available())  # which alone lets processes on CPUs meet
    judging = _judging(args) if processes.is_main_process else None  # what is wrong with it is told before the clips
    if args.system in SYSTEMS:
        if args.model is None:
            raise SettingError(f"--model is missing: give the folder of {args.system}'s weights")
        weights = Weights(model=args.model, adapter=args.adapter, id_encoder=args.id_encoder)
        size = Size(width=args.width, height=args.height, frames=args.frames, steps=args.steps)
        if args.adapter is not None:  # whose file may be replaced by one of the next run, under the same name
            trained = str(read_header(args.adapter).trained)
        made_with = {name: str(path) for name, path in vars(weights).items()} | {"weights": trained}
        with processes.main_process_first():
            check_run(out, made_with, size, args.seed)
        with _bar("clip", processes.is_main_process) as show:
            generate(
                entries, lambda: LOADERS[args.system](weights, _analyzer(args), processes.device), out, size=size,
                seed=args.seed, device=processes.device, rank=processes.process_index,
                world_size=processes.num_processes, on_clip=show,
            )  # fmt: skip
        processes.wait_for_everyone()
    elif not (out / VIDEOS).is_dir():
        raise SettingError(
            f"{args.system} is none of {', '.join(SYSTEMS)}, and there are no clips of another system in "
            f"{out / VIDEOS}: put them there as {clip_of(out, entries[0]).name}"
        )
    code = 0
    if judging is not None:
        made = max((path.stat().st_mtime for path in (out / VIDEOS).rglob("*")), default=0.0)
        if not (out / RESULTS).is_file() or (out / RESULTS).stat().st_mtime < made:
            code = _measure(args, judging, out / VIDEOS, args.set, out, trained)
        print(*write_tables(args.out), sep="\n")
    processes.destroy_process_group()
    return code


def export(args: argparse.Namespace) -> int:
    """Copy a system's clips under the names that VBench or OpenS2V-Eval look for."""
    from .benchmark_set import read_set
    from .exports import WRITERS

    if args.out.exists():
        raise MagicMirrorError(f"{args.out} is there already: give another folder, or remove it")
    WRITERS[args.to](read_set(args.set), args.clips, args.out)
    print(args.out)
    return 0


def factors(args: argparse.Namespace) -> int:
    """Draw an adapter's scale factors for a person, by modality, layer and time step."""
    import torch

    from ..faces.references import analyse_references
    from ..picture_file import read_image
    from .factors import check_drawing, scale_factors, write_factors
    from .systems import Weights, mirror_of

    check_drawing()
    if args.out.suffix.lower() != ".png":
        raise SettingError(f"{args.out.name} is no PNG: call it {args.out.stem}.png")
    weights = Weights(model=args.model, adapter=args.adapter, id_encoder=args.id_encoder)
    mirror = mirror_of(weights, torch.device("cpu"))
    identity = mirror.identity(analyse_references(_analyzer(args), [read_image(path) for path in args.reference]))
    found = scale_factors(mirror, identity, args.steps)
    print(*write_factors(found, args.out), sep="\n")
    print(found.summary)
    return 0


def _judging(args: argparse.Namespace) -> dict[str, Any]:
    """The networks that the user chose: arguments of `evaluate`."""
    from .inception import Inception
    from .opens2v import FaceSim
    from .people import mean_face
    from .raft import Raft
    from .text import TextAlignment

    analyzer = _analyzer(args)
    return {
        "analyzer": analyzer,
        "centre": mean_face(analyzer, args.centre) if args.centre else None,
        "alignment": TextAlignment(args.clip) if args.clip else None,
        "flow_between": Raft(args.raft) if args.raft else None,
        "facesim": FaceSim(analyzer, args.curricularface),
        "inception": Inception(args.inception) if args.inception else None,
    }


def _measure(
    args: argparse.Namespace, judging: dict[str, Any], videos: Path, references: Path, out: Path,
    adapter: str | None = None,
) -> int:  # fmt: skip
    """Measure, write, print the summary. 0, or 1 if some could not be measured.

    adapter: what that of the videos has been through, if it is known.
    """
    from .recognisers import other_judges
    from .report import write_report
    from .run import evaluate

    judges = other_judges()
    with _bar("video") as show:
        evaluation = evaluate(
            videos=videos, references=references, threshold=args.threshold, judges=judges,
            on_video=lambda name, done, total: show(done, total, name), **judging,
        )  # fmt: skip
        show(len(evaluation.clips) + len(evaluation.skipped), len(evaluation.clips) + len(evaluation.skipped))
    settings = {
        "face_pack": args.face_pack,
        "threshold": args.threshold,
        "centred": args.centre is not None,
        "flow": args.raft.name if args.raft else "DIS",
        "clip": args.clip.name if args.clip else None,
        "judges": [judge.name for judge in judges],
    } | ({} if adapter is None else {"adapter": adapter})
    for path in write_report(out, evaluation, settings):
        print(path)
    for left_out in evaluation.skipped:
        print(f"not measured: {left_out.video}: {left_out.reason}", file=sys.stderr)
    print(f"{len(evaluation.clips)} videos measured, {len(evaluation.skipped)} not")
    return 1 if evaluation.skipped else 0


def _analyzer(args: argparse.Namespace) -> Any:
    from ..faces.analysis import FaceAnalyzer

    return FaceAnalyzer(args.insightface_root, args.face_pack)


@contextmanager
def _bar(unit: str, shown: bool = True) -> Iterator[Callable[..., None]]:
    """A function that shows how many are done, of how many, and a name."""
    from tqdm import tqdm

    with tqdm(unit=unit, disable=not shown) as bar:

        def show(done: int, total: int, name: str = "") -> None:
            bar.total = total
            bar.set_postfix_str(name, refresh=False)
            bar.update(done - bar.n)

        yield show


def _cosine(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 2.0
    if not -1 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no cosine: give a number from -1 to 1")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mm_core.evaluation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    runs = {"score": score, "set": make_set, "benchmark": benchmark, "export": export, "factors": factors}
    for name, run in runs.items():
        command = commands.add_parser(
            name, help=run.__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        command.set_defaults(run=run)
        add = command.add_argument
        _ARGUMENTS[run](add)
        if run is not export:
            add("--insightface-root", type=Path, default=INSIGHTFACE, help="holds models/<pack>/*.onnx")
            add("--face-pack", default="buffalo_l", help="insightface model pack; it matters")
    return parser


def _score_arguments(add: Callable[..., Any]) -> None:
    add("--videos", type=Path, required=True, help="folder of <identity>*.mp4 or <identity>/*.mp4")
    add("--references", type=Path, required=True, help="folder of <identity>/*.jpg or <identity>_1.jpg, ...")
    add("--out", type=Path, required=True, help="folder for results.json, results.csv and report.html")
    _measuring_arguments(add)


def _measuring_arguments(add: Callable[..., Any]) -> None:
    add("--threshold", type=_cosine, default=MIN_SAME_PERSON, help="cosine from which a clip is of the person")
    add("--centre", type=Path, help="folder of many people's photos whose mean embedding is subtracted")
    add("--clip", type=Path, help="folder of a CLIPModel, to compare clips with their prompts")
    add("--raft", type=Path, help="state dict of torchvision's raft_small or raft_large, for flow as in VBench")
    add("--curricularface", type=Path, help="CurricularFace's published weights, for FaceSim-Cur")
    add("--inception", metavar="FILE", help="torchvision's inception_v3, or download, for the Inception Score")


def _set_arguments(add: Callable[..., Any]) -> None:
    add("--people", type=Path, required=True, help="folder of <class>/<person>/*.jpg, 1 to 4 photos each")
    add("--out", type=Path, required=True, help="folder of the benchmark, which must not be there")
    add("--number", type=int, default=50, help="how many people there must be")


def _benchmark_arguments(add: Callable[..., Any]) -> None:
    add("--set", type=Path, required=True, help="folder of the benchmark, or of IPVG's test set")
    add("--out", type=Path, required=True, help="folder for a folder of each system, and for the tables")
    add("--system", required=True, help=f"{', '.join(SYSTEMS)}, or any other whose clips are in <out>/<system>/videos")
    add("--model", help="folder of the system's weights in diffusers' layout, a published name of CogVideoX, or tiny")
    _adapter_arguments(add, "magic-mirror: ")
    add("--width", type=int, default=0, help="pixels; 0: the model's own, of baselines 720")
    add("--height", type=int, default=0, help="pixels; 0: the model's own, of baselines 480")
    add("--frames", type=int, default=0, help="0: the model's own, of baselines 49")
    add("--steps", type=int, default=0, help="0: the model's own, of baselines 50")
    add("--seed", type=int, default=0, help="of the first clip; every clip has its own")
    _measuring_arguments(add)


def _export_arguments(add: Callable[..., Any]) -> None:
    add("--set", type=Path, required=True, help="folder of the benchmark")
    add("--clips", type=Path, required=True, help="a system's folder, as benchmark makes it")
    add("--to", required=True, choices=EXPORTS, help="whose names the clips take")
    add("--out", type=Path, required=True, help="folder that is made, which must not be there")


def _factors_arguments(add: Callable[..., Any]) -> None:
    add("--model", required=True, help="folder of a base model in diffusers' layout, a published name, or tiny")
    _adapter_arguments(add)
    add("--reference", type=Path, nargs="+", required=True, help="photos of one person")
    add("--steps", type=int, default=50, help="of the schedule, 1 to 100")
    add("--out", type=Path, required=True, help="the picture, such as factors.png; factors.csv is written beside it")


def _adapter_arguments(add: Callable[..., Any], whose: str = "") -> None:
    add("--adapter", type=Path, help=f"{whose}adapter file; tiny brings its own")
    add("--id-encoder", type=Path, help=f"{whose}photomaker-v2.bin; default: where fetch puts it; tiny brings its own")


_ARGUMENTS = {
    score: _score_arguments, make_set: _set_arguments, benchmark: _benchmark_arguments, export: _export_arguments,
    factors: _factors_arguments,
}  # fmt: skip

if __name__ == "__main__":
    sys.exit(main())
