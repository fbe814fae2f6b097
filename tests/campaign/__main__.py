"""Hostile files by the ten thousand: `python -m tests.campaign --inputs 10000 --report report.md`.

Each batch runs in a process of its own, which may not start programs, open sockets, or touch files elsewhere. A file
may be read or refused in words; everything else is a finding: another exception, a dead process, more than TIME
seconds of computing, more than GROWTH bytes. A finding is repeated by
`--only "KIND" --seed SEED --first NUMBER --inputs 1`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch

from mm_core.errors import MagicMirrorError

from .kinds import KINDS
from .mutate import damaged

ROOT = Path(__file__).parents[2]
TIME, GROWTH = 10, 2**30
_BATCH = 50
_WAIT = 10  # times TIME by the clock: it waits for something
_SLOW = 6  # folders take so many times longer than single files: they get that part of the inputs
_EVENTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect", "socket.getaddrinfo")


def main() -> int:
    args = _arguments()
    torch.set_num_threads(1)
    chosen = [args.only] if args.only else list(KINDS)
    shares = {kind: 1 / _SLOW if kind.startswith("folder") else 1.0 for kind in chosen}
    counts: dict[str, Counter[str]] = {}
    findings: list[dict[str, object]] = []
    begun = time.monotonic()
    for kind in chosen:
        inputs = args.inputs if args.only else -int(-args.inputs * shares[kind] // sum(shares.values()))
        counts[kind] = Counter()
        first, last = args.first, args.first + inputs
        while first < last:
            first = _batch(kind, args.seed, first, min(_BATCH, last - first), counts[kind], findings)
        print(kind, dict(counts[kind]), f"{time.monotonic() - begun:.0f} s", flush=True)
    text = _report(counts, findings, args.seed, time.monotonic() - begun)
    if args.report:
        args.report.write_text(text, encoding="utf-8")
    print(text)
    return 1 if findings else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--only")
    parser.add_argument("--report", type=Path)
    return parser.parse_args()


def _batch(
    kind: str, seed: int, first: int, inputs: int, counts: Counter[str], findings: list[dict[str, object]]
) -> int:
    """Run a process for some inputs; the number of the next one, which is nearer where the process died."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "results"
        child = os.fork()  # a fresh Python would take seconds to import what is read with
        if not child:
            _work(kind, seed, first, inputs, log, Path(folder) / "files")
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    results = [json.loads(line) for line in lines if line.endswith("}")]
    for result in results:
        counts[result["outcome"]] += 1
        if result["outcome"] not in ("read", "refused"):
            findings.append({"kind": kind, **result})
    if status == 0:
        return first + inputs
    number = first + len(results)
    outcome = "hang" if status in (-signal.SIGPROF, -signal.SIGALRM) else "dead process"
    counts[outcome] += 1
    findings.append({"kind": kind, "number": number, "outcome": outcome, "what": f"exit status {status}"})
    return number + 1


def _work(kind: str, seed: int, first: int, inputs: int, log: Path, folder: Path) -> NoReturn:
    """In the child."""
    try:
        folder.mkdir()
        path = KINDS[kind].make(folder)
        good = path.read_bytes()
        KINDS[kind].read(path)  # a good file is read, and what is imported late is imported
        watch = _Watch(folder)
        sys.addaudithook(watch)
        with log.open("w", encoding="utf-8") as file:
            for number in range(first, first + inputs):
                result = {"number": number} | _outcome(kind, seed, number, path, good, watch)
                print(json.dumps(result), file=file, flush=True)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _outcome(kind: str, seed: int, number: int, path: Path, good: bytes, watch: _Watch) -> dict[str, object]:
    """What becomes of one input; of a finding, with as few changes as show it too."""
    mutations = 1 + number % 4
    result = _try(KINDS[kind].read, path, good, f"{seed} {kind} {number}", mutations, watch)
    for fewer in range(1, mutations) if result["outcome"] not in ("read", "refused") else ():
        again = _try(KINDS[kind].read, path, good, f"{seed} {kind} {number}", fewer, watch)
        if again["outcome"] == result["outcome"]:
            return again
    return result


def _try(
    read: Callable[[Path], object], path: Path, good: bytes, seed: str, mutations: int, watch: _Watch
) -> dict[str, object]:
    path.write_bytes(damaged(good, seed, mutations))
    before, watch.seen = _peak(), []
    signal.setitimer(signal.ITIMER_PROF, TIME)  # of this process, however busy the machine is
    signal.alarm(_WAIT * TIME)
    outcome, what = "read", ""
    try:
        read(path)
    except MagicMirrorError as error:
        outcome, what = "refused", str(error)[:200]
    except BaseException as error:  # also a panic of Rust code
        place = traceback.extract_tb(error.__traceback__)[-1]
        outcome, what = "raw error", f"{type(error).__name__} at {place.filename}:{place.lineno}: {error}"[:300]
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
    if watch.seen:
        outcome, what = "reached out", str(watch.seen[:3])
    elif _peak() - before > GROWTH:
        outcome, what = "memory", f"{_peak() - before:,} bytes"
    return {"outcome": outcome, "what": what, "mutations": mutations, "bytes": path.stat().st_size}


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class _Watch:
    """Notes programs, sockets, and files outside of the folder, of Python and of the project."""

    def __init__(self, folder: Path) -> None:
        places = (folder, sys.prefix, sys.base_prefix, ROOT, "/proc", "/sys", "/dev")
        self.allowed = tuple(os.path.realpath(place) for place in places)
        self.temporary = tempfile.gettempdir()
        self.seen: list[str] = []

    def __call__(self, event: str, arguments: tuple[object, ...]) -> None:
        if event in _EVENTS:
            self.seen.append(event)
        elif event == "open" and isinstance(arguments[0], (str, bytes)):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            if not path.startswith((*self.allowed, self.temporary)):
                self.seen.append(path)


def _report(counts: dict[str, Counter[str]], findings: list[dict[str, object]], seed: int, seconds: float) -> str:
    total = sum(sum(counter.values()) for counter in counts.values())
    title = f"# {total:,} damaged files of {len(counts)} kinds, seed {seed}, {seconds:.0f} s: {len(findings)} findings"
    lines = [title, ""]
    outcomes = sorted({outcome for counter in counts.values() for outcome in counter})
    lines += ["| kind | " + " | ".join(outcomes) + " |", "|---" * (len(outcomes) + 1) + "|"]
    lines += [f"| {kind} | " + " | ".join(str(c[outcome]) for outcome in outcomes) + " |" for kind, c in counts.items()]
    smallest: dict[tuple[object, ...], dict[str, object]] = {}
    for finding in sorted(findings, key=lambda f: (f.get("mutations", 9), f.get("bytes", 0))):
        smallest.setdefault((finding["kind"], finding["outcome"], str(finding["what"])[:60]), finding)
    for finding in smallest.values():
        lines.append(
            f"\n- {finding['outcome']}: {finding['what']}\n  repeat with --only \"{finding['kind']}\" --seed {seed} "
            f"--first {finding['number']} --inputs 1"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
