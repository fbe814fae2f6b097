"""`python -m mm_core.evaluation`: measure a folder of videos against reference photos of the people in them."""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

from ..errors import MagicMirrorError, packages
from ..faces.references import MIN_SAME_PERSON


def main(argv: list[str] | None = None) -> int:
    """Return the exit code: 0, 1 if some videos could not be measured, 2 for a mistake of the user, 130 interrupted."""
    args = _parser().parse_args(argv)
    try:
        with packages():
            return evaluate_folder(args)
    except MagicMirrorError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("cancelled; nothing was written", file=sys.stderr)
        return 130


def evaluate_folder(args: argparse.Namespace) -> int:
    """Measure, write, print the summary. 0, or 1 if some videos could not be measured."""
    from tqdm import tqdm

    from ..faces.analysis import FaceAnalyzer
    from .people import mean_face
    from .raft import Raft
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
        prog="python -m mm_core.evaluation",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--videos", type=Path, required=True, help="folder of <identity>*.mp4 or <identity>/*.mp4")
    add("--references", type=Path, required=True, help="folder of <identity>/*.jpg or <identity>_1.jpg, ...")
    add("--out", type=Path, required=True, help="folder for results.json, results.csv and report.html")
    add("--insightface-root", type=Path, default=Path.home() / ".insightface", help="holds models/<pack>/*.onnx")
    add("--face-pack", default="buffalo_l", help="insightface model pack; the numbers depend on it")
    add("--threshold", type=_cosine, default=MIN_SAME_PERSON, help="cosine from which a clip is of the person")
    add("--centre", type=Path, help="folder of many people's photos whose mean embedding is subtracted")
    add("--clip", type=Path, help="folder of a CLIPModel, to compare clips with <video>.txt or prompts.json")
    add("--raft", type=Path, help="state dict of torchvision's raft_small or raft_large, for flow as in VBench")
    return parser


if __name__ == "__main__":
    sys.exit(main())
