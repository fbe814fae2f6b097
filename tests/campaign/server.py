"""Bad inputs through a real ComfyUI: `python -m tests.campaign.server --comfyui FOLDER --report report.md`.

Every answer must be a refusal in words: of ComfyUI itself, or an error of this pack that names the value. Findings are
other exceptions, and a widget behind the sampler that is refused only after it has sampled.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
import urllib.error
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from mm_core import errors
from mm_core.pipelines.tiny import TRANSFORMER

from . import values
from .inputs import Case, cases

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests")]
from comfy_server import ComfyClient, ComfyServer, ExecutionFailed, ServerFailed, WorkflowRefused  # noqa: E402
from lora_files import write_loras  # noqa: E402

OURS = {name for name, item in vars(errors).items() if isinstance(item, type) and issubclass(item, Exception)}
FINDINGS = ("raw", "late", "dead")
RAW = re.compile(
    r"Traceback|\b(Key|Attribute|Type|Value|Index|Runtime|Unicode\w*|Name|Assertion|ZeroDivision|Overflow)Error\b|"
    r"expected .*(tensor|Tensor)|object has no attribute|NoneType|unexpected keyword|<class |exception_during"
)
"""What no user should read."""


def start(comfyui: Path, base: Path, insightface_root: Path) -> ComfyServer:
    """A ComfyUI, not entered yet, that has what the graphs need, and keeps what was loaded for the next graph."""
    _install(base)
    kept = ("--cache-lru", "60")
    return ComfyServer(
        comfyui, Path(sys.executable), base, ROOT, extra_args=kept, insightface_root=insightface_root
    )


def _install(base: Path) -> None:
    """What the graphs need in ComfyUI's base folder, before it starts."""
    shutil.copy(values.__file__, _made(base / "custom_nodes") / "campaign_values.py")
    people = ROOT / "mm_core" / "examples"
    shutil.copy(people / "man.safetensors", _made(base / "models" / "magic_mirror_identities") / "campaign.safetensors")
    with tempfile.TemporaryDirectory() as folder:
        lora = write_loras(Path(folder) / "loras", TRANSFORMER)["kohya"]
        shutil.copy(lora, _made(base / "models" / "loras") / "campaign.safetensors")


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def answer(server: ComfyClient, case: Case) -> tuple[str, str]:
    """What came of a case, and ComfyUI's answer: accepted, refused by ComfyUI, refused by us, or a finding."""
    try:
        server.run(case.graph, timeout=60)
    except WorkflowRefused as refused:
        text = str(refused)
        if "exception_during" in text or "Exception when validating" in text:
            return "raw", text
        ours = "Custom validation failed" in text
        return ("raw" if ours and RAW.search(text) else "refused by us" if ours else "refused by ComfyUI"), text
    except ExecutionFailed as failed:
        text = str(failed)
        _, kind, message = text.split(": ", 2)
        if kind.rpartition(".")[2] not in OURS or RAW.search(message):
            return "raw", text
        return ("late" if case.before else "refused by us"), text
    except urllib.error.HTTPError as error:
        return "raw", f"HTTP {error.code}: {error.read()[:300]!r}"
    except (TimeoutError, ServerFailed) as error:
        return "dead", f"{type(error).__name__}: {error}"
    return "accepted", ""


def run(server: ComfyClient, chosen: Iterable[Case]) -> list[tuple[Case, str, str]]:
    """Each case, its outcome and the answer; the first that does not end, or ends the server, is the last."""
    results = []
    for case in chosen:
        results.append((case, *answer(server, case)))
        print(len(results), results[-1][1], ascii(case.name), flush=True)
        if results[-1][1] == "dead":
            break
    return results


def pack_cases(server: ComfyClient) -> list[Case]:
    return list(cases(server.object_info()))


def report(results: list[tuple[Case, str, str]]) -> str:
    """Counts, the findings, and each of our messages once, to be read."""
    counts = Counter(outcome for _, outcome, _ in results)
    lines = [f"# {len(results)} bad inputs through the server: {sum(counts[name] for name in FINDINGS)} findings", ""]
    lines += [f"- {outcome}: {count}" for outcome, count in counts.most_common()]
    for wanted in (*FINDINGS, "refused by us", "accepted"):
        lines += ["", f"## {wanted}"]
        lines += [f"- {case.name!a}\n  {text[:400]!a}" for case, outcome, text in results if outcome == wanted]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, required=True, help="its folder")
    parser.add_argument("--insightface-root", type=Path, required=True, help="holds models/<pack>/*.onnx")
    parser.add_argument("--only", default="", help="cases whose name has this text")
    parser.add_argument("--report", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        with start(args.comfyui, base, args.insightface_root) as server:
            results = run(server, [case for case in pack_cases(server) if args.only in case.name])
    text = report(results)
    if args.report:
        args.report.write_text(text, encoding="utf-8")
    print(text)
    return 1 if any(outcome in FINDINGS for _, outcome, _ in results) else 0


if __name__ == "__main__":
    sys.exit(main())
