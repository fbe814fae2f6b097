"""`python -m mm_core.evaluation score`: measure a folder of videos against reference photos of the people in them."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

from ..errors import MagicMirrorError, packages
from ..faces.references import MIN_SAME_PERSON


def main(argv: list[str] | None = None) -> int:
    """Return the exit code: 0, 1 if some videos could not be measured, 2 for a mistake of the user, 130 interrupted."""
    args = _parser().parse_args(argv)
    try:
        with packages():
            return args.run(args)
    except MagicMirrorError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("cancelled; nothing was written", file=sys.stderr)
        return 130


def score(args: argparse.Namespace) -> int:
    """Measure a folder of videos, write, print the summary. 0, or 1 if some videos could not be measured."""
    from tqdm import tqdm

    from ..faces.analysis import FaceAnalyzer
    from .inception import Inception
    from .opens2v import FaceSim
    from .people import mean_face
    from .raft import Raft
    from .recognisers import other_judges
    from .report import write_report
    from .run import evaluate
    from .text import TextAlignment

    warnings.filterwarnings("ignore", "`estimate` is deprecated", FutureWarning)  # insightface's, in mid-progress
    analyzer = FaceAnalyzer(args.insightface_root, args.face_pack)
    centre = mean_face(analyzer, args.centre) if args.centre else None
    options = {
        "centre": centre,
        "alignment": TextAlignment(args.clip) if args.clip else None,
        "flow_between": Raft(args.raft) if args.raft else None,
        "judges": other_judges(analyzer),
        "facesim": FaceSim(analyzer, args.curricularface),
        "inception": Inception(args.inception) if args.inception else None,
    }
    with tqdm(unit="video") as bar:

        def show(name: str, done: int, total: int) -> None:
            bar.total, bar.n = total, done
            bar.set_postfix_str(name)

        evaluation = evaluate(
            analyzer, args.videos, args.references, threshold=args.threshold, on_video=show, **options
        )
        bar.n = bar.total
        bar.set_postfix_str("")
    settings = {
        "face_pack": args.face_pack,
        "threshold": args.threshold,
        "centred": centre is not None,
        "flow": args.raft.name if args.raft else "DIS",
        "clip": args.clip.name if args.clip else None,
        "judges": [judge.name for judge in options["judges"]],
    }
    for path in write_report(args.out, evaluation, settings):
        print(path)
    for left_out in evaluation.skipped:
        print(f"not measured: {left_out.video}: {left_out.reason}", file=sys.stderr)
    print(f"{len(evaluation.clips)} videos measured, {len(evaluation.skipped)} not")
    return 1 if evaluation.skipped else 0


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
    _score_arguments(_command(commands, "score", score))
    return parser


def _command(commands: argparse._SubParsersAction, name: str, run: Callable[..., int]) -> argparse.ArgumentParser:
    first = run.__doc__.splitlines()[0]
    command = commands.add_parser(name, help=first, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    command.set_defaults(run=run)
    return command


def _score_arguments(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--videos", type=Path, required=True, help="folder of <identity>*.mp4 or <identity>/*.mp4")
    add("--references", type=Path, required=True, help="folder of <identity>/*.jpg or <identity>_1.jpg, ...")
    add("--out", type=Path, required=True, help="folder for results.json, results.csv and report.html")
    add("--insightface-root", type=Path, default=Path.home() / ".insightface", help="holds models/<pack>/*.onnx")
    add("--face-pack", default="buffalo_l", help="insightface model pack; the numbers depend on it")
    add("--threshold", type=_cosine, default=MIN_SAME_PERSON, help="cosine from which a clip is of the person")
    add("--centre", type=Path, help="folder of many people's photos whose mean embedding is subtracted")
    add("--clip", type=Path, help="folder of a CLIPModel, to compare clips with <video>.txt or prompts.json")
    add("--raft", type=Path, help="state dict of torchvision's raft_small or raft_large, for flow as in VBench")
    add("--curricularface", type=Path, help="CurricularFace's published weights, for FaceSim-Cur")
    add("--inception", metavar="FILE", help="torchvision's inception_v3, or download, for the Inception Score")


if __name__ == "__main__":
    sys.exit(main())
