"""Bad arguments to the command lines: `python -m tests.campaign.commands --insightface-root FOLDER`.

Each must end with exit code 2 and one line that names the value, before anything is sampled. Commands run in this
process. Findings are exceptions, raw texts, and refusals that come after the sampler.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

from mm_core import __main__ as generating
from mm_core.evaluation import __main__ as evaluating
from mm_core.pipelines.magic_mirror import MagicMirror
from mm_core.release import commands as training

ROOT = Path(__file__).parents[2]
RAW = re.compile(r"Traceback|\b\w+Error\b|has no attribute|NoneType|<class |Errno")
_INTS = ["-1", str(2**70), "abc", "", "1.5", "nan", "-99999999"]
_FLOATS = ["nan", "inf", "-inf", "1e9", "-1e9", "abc", ""]
_TEXTS = ["", " ", "\udc80", "x" * 50_000, "../../x", "/nowhere/x", "\n", "7:nan", "%s{}"]
_SETTINGS = ["", "abc", "-1", "nan", "[]", str(2**70)]
Command = tuple[Callable[[list[str]], int], list[str]]


def commands(folder: Path, insightface_root: Path) -> Iterator[Command]:
    """Each: a `main`, and its arguments. folder: an empty one."""
    files = _files(folder)
    photo = str(ROOT / "mm_core" / "examples" / "woman_1.jpg")
    good = {
        "--reference": photo, "--prompt": "A woman img smiles.", "--output": str(folder / "clip.gif"),
        "--insightface-root": str(insightface_root), "--face-pack": "buffalo_sc", "--steps": "1", "--frames": "1",
    }  # fmt: skip
    yield from _of_parser(generating, "generate", good, files)
    yield from _of_parser(generating, "doctor", {}, files)
    config = {"--config": str(ROOT / "lab" / "tiny" / "tiny.yaml")}
    yield from _of_parser(training, "plan", config, files)
    for name in _setting_names():
        for value in _SETTINGS:
            yield training.main, ["plan", f"--config={config['--config']}", "--set", f"{name}={value}"]
    measured = {"--videos": files[1], "--references": files[1], "--out": str(folder / "out"), "--face-pack":
                "buffalo_sc", "--insightface-root": str(insightface_root)}  # fmt: skip
    yield from _of_parser(evaluating, "score", measured, files)


def _files(folder: Path) -> list[str]:
    """Paths of what is no picture, no video, and no model."""
    (folder / "folder.mp4").mkdir()
    (folder / "empty.png").touch()
    (folder / "text.png").write_text("no picture")
    shutil.copy(ROOT / "mm_core" / "examples" / "woman_1.jpg", folder / "cut.jpg")
    content = (folder / "cut.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(content[: len(content) // 3])
    names = ("nowhere.png", "folder.mp4", "empty.png", "text.png", "cut.jpg", "nowhere/clip.mp4")
    return [str(folder / name) for name in names]


def _of_parser(module: object, command: str | None, good: dict[str, str], files: list[str]) -> Iterator[Command]:
    """For each argument of a command that takes a value, bad ones of its type."""
    parser = module._parser()
    if command is not None:
        (commands_,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
        parser = commands_.choices[command]
    for action in parser._actions:
        if action.nargs == 0 or not action.option_strings:
            continue
        name = action.option_strings[-1]
        others = [f"{option}={value}" for option, value in good.items() if option != name]
        for value in _bad(action, files):
            yield module.main, [*([command] if command else []), *others, f"{name}={value}"]


def _bad(action: argparse.Action, files: list[str]) -> list[str]:
    if action.type is int:
        return _INTS
    if action.type is float:
        return _FLOATS
    if action.type is Path:
        return [*files, *_TEXTS]
    return _TEXTS


def _setting_names() -> list[str]:
    """Every setting of a training config, by its dotted name."""
    from dataclasses import fields, is_dataclass

    from mm_core.training.config import load_config

    def names(of: object, before: str) -> Iterator[str]:
        for item in fields(of):
            value = getattr(of, item.name)
            if is_dataclass(value):
                yield from names(value, f"{before}{item.name}.")
            yield before + item.name

    return list(names(load_config(ROOT / "lab" / "tiny" / "tiny.yaml"), ""))


def answer(command: Command) -> tuple[str, str]:
    """What came of a command: accepted, refused, or a finding; and the line that told it."""
    main_, arguments = command
    out: io.StringIO = io.StringIO()
    sampled: list[bool] = []
    sample = MagicMirror.sample

    def noted(*inputs: object, **settings: object) -> object:
        latents = sample(*inputs, **settings)
        sampled.append(True)
        return latents

    try:
        with (
            mock.patch.object(MagicMirror, "sample", noted),
            contextlib.redirect_stderr(out),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            code = main_(arguments)
    except SystemExit as left:
        code = left.code
    except BaseException as error:
        return "raw", f"{type(error).__name__}: {error}"[:300]
    text = (out.getvalue().strip().splitlines() or [""])[-1]
    if code == 0:
        return "accepted", ""
    if code not in (1, 2) or RAW.search(text):
        return "raw", f"exit code {code}: {text[:300]}"
    return ("late" if sampled else "refused"), text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--insightface-root", type=Path, required=True, help="holds models/<pack>/*.onnx")
    parser.add_argument("--report", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        results = [
            (command[1][0:1] + command[1][-1:], *answer(command))
            for command in commands(Path(folder), args.insightface_root.absolute())
        ]
    counts = Counter(outcome for _, outcome, _ in results)
    findings = counts["raw"] + counts["late"]
    lines = [f"# {len(results)} bad arguments: {findings} findings", "", f"{dict(counts)}"]
    for wanted in ("raw", "late", "refused", "accepted"):
        lines += ["", f"## {wanted}"]
        lines += [f"- {str(name)[:150]!a}\n  {text[:300]!a}" for name, outcome, text in results if outcome == wanted]
    if args.report:
        args.report.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(*lines[:3], sep="\n")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
