"""Other processes: two of torch.distributed (gloo, on the CPU), and ones that are killed."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from multiprocessing.context import BaseContext
from pathlib import Path

HERE = Path(__file__).resolve().parent
PREPARATION = (
    f"import sys; from pathlib import Path; sys.path[:0] = {[str(HERE.parent), str(HERE)]!r}\n"
    "from accelerate import PartialState; assert PartialState(cpu=True).num_processes == 2\n"
)
"""What a script of theirs begins with: it knows the tests' modules, and that they are two."""


def run_two(*arguments: str) -> str:
    """Run a script, or `-m` and a module, in two processes; returns what they print.

    Not by `accelerate launch --cpu --num_processes 2`, which starts one.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *arguments]
    env = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.run(command, check=True, env=env, cwd=HERE.parent, stdout=subprocess.PIPE, text=True).stdout


def imported() -> BaseContext:
    """Of processes that have imported all that their tests want and done nothing. A fork of the tests' own, which has
    threads, may wait for ever for what one of them held."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["small_shards", "mm_core.release.whole"])
    return context
