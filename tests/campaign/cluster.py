"""Curation on two Ray nodes, killed again and again: `python -m tests.campaign.cluster --kills 4`.

Both nodes are on this machine, started by `ray start`, of one processor each. SIGKILL ends the command at random
times, once the second node with it, which then comes back. The next start goes on, and manifest and list of what was
dropped are, in the end, those of one process that nothing disturbed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from lab.corpus.__main__ import inputs, plant
from mm_core.curation.run import DROPPED, MEASURED
from mm_core.data.manifest import MANIFEST

ROOT = Path(__file__).parents[2]
_TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": hashlib.sha256(os.urandom(32)).hexdigest()}


def main() -> int:
    args = _arguments()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        truth = plant("pictures", folder, range(args.people))
        base = [sys.executable, "-m", "mm_core.curation", "pictures", *map(str, inputs(folder / "raw"))]
        base += ["--set", f"measure.insightface_root={args.insightface_root}", "measure.face_pack=buffalo_sc"]
        base += ["keep.min_score=0.5"]
        subprocess.run([*base, "--out", folder / "alone", "--workers", "1"], cwd=ROOT, check=True)
        wanted = _hashes(folder / "alone")
        with two_nodes(folder) as (address, second):
            command = [*base, "--out", folder / "cluster", "--workers", "2", "--address", address]
            _killed(command, args.kills, folder / "cluster" / MEASURED, second)
            subprocess.run(command, cwd=ROOT, check=True, env=os.environ | _TOKEN)
            found = _hashes(folder / "cluster")
    print(f"{len(truth)} items, {args.kills} kills: {'the same' if found == wanted else 'ANOTHER'} set, {found}")
    return int(found != wanted)


def _hashes(folder: Path) -> dict[str, str]:
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest()[:16] for name in (MANIFEST, DROPPED)}


def _killed(command: list[object], kills: int, measured: Path, second: list[subprocess.Popen]) -> None:
    """Start the command and kill it so many times; the first time the second node dies before it."""
    generator = random.Random(0)
    for kill in range(kills):
        process = subprocess.Popen(command, cwd=ROOT, env=os.environ | _TOKEN, start_new_session=True)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(generator.uniform(10, 40))
        if kill == 0:
            _end(second.pop())
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            second.append(_node(command[-1].rpartition(":")[2], head=None))
        _end(process)
        print(f"kill {kill + 1}: {len(list(measured.glob('*.jsonl')))} shards are measured", flush=True)


@contextlib.contextmanager
def two_nodes(folder: Path) -> Iterator[tuple[str, list[subprocess.Popen]]]:
    """The cluster's address, and the process of its second node."""
    port = _free_port()
    head, second = _node(port, head=folder / "ray"), [_node(port, head=None)]
    try:
        yield f"127.0.0.1:{port}", second
    finally:
        for process in (*second, head):
            _end(process)


def _node(port: int | str, head: Path | None) -> subprocess.Popen:
    """head: its folder; None for another node. Each has ports of its own where Ray's defaults would be the same."""
    start = ["--address", f"127.0.0.1:{port}"]
    if head is not None:
        start = ["--head", "--port", str(port), "--include-dashboard", "false", "--temp-dir", str(head)]
    start += ["--num-cpus", "1", "--object-store-memory", str(80 * 2**20), "--disable-usage-stats", "--block"]
    start += ["--min-worker-port", "0", "--max-worker-port", "0"]
    for what in ("dashboard-agent-listen-port", "metrics-export-port"):
        start += [f"--{what}", str(_free_port())]
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", *start]
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, env=os.environ | _TOKEN, start_new_session=True, **quiet)
    while head is not None and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", int(port))):
            break
        time.sleep(0.2)
    return process


def _end(process: subprocess.Popen) -> None:
    """With all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.campaign.cluster", description=__doc__)
    parser.add_argument("--kills", type=int, default=4)
    parser.add_argument("--people", type=int, default=30, help="of the made corpus: 24 photos of each")
    parser.add_argument("--insightface-root", type=Path, required=True)
    parser.add_argument("--folder", type=Path, help="for temporary files")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
