"""Short slices of the campaigns; all of them: `python -m tests.campaign`, and `python -m tests.campaign.commands`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.campaign.commands import answer, commands

ROOT = Path(__file__).parents[1]


def campaign(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.campaign", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_slice_finds_nothing(tmp_path: Path) -> None:
    done = campaign("--inputs", "300", "--seed", "7", "--report", str(tmp_path / "report.md"))
    assert done.returncode == 0, done.stdout + done.stderr
    title = (tmp_path / "report.md").read_text(encoding="utf-8").splitlines()[0]
    assert title.endswith(": 0 findings") and "of 19 kinds, seed 7" in title


CONTROL = """
import os, socket, sys, time
from tests.campaign import __main__ as campaign
from tests.campaign.kinds import Kind

def make(folder):
    (folder / "file").write_bytes(b"good")
    return folder / "file"

def fail():
    raise KeyError("x")

bad = {
    "raw error": fail,
    "dead process": lambda: os.kill(os.getpid(), 11),
    "hang": lambda: [time.sleep(0) for _ in iter(int, 1)],
    "memory": lambda: b"x" * (5 * 2**26),
    "reached out": lambda: open("/etc/passwd").close(),
}
campaign.KINDS.clear()
for name, act in bad.items():
    campaign.KINDS[name] = Kind(make, lambda path, act=act: path.read_bytes() == b"good" or act())
campaign.TIME, campaign.GROWTH = 2, 2**28
sys.exit(campaign.main())
"""


def test_it_would_see() -> None:
    """A reader that fails in each of the ways is found out in each."""
    command = [sys.executable, "-c", CONTROL, "--inputs", "5", "--first", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    outcomes = ("raw error", "dead process", "hang", "memory", "reached out")
    assert done.returncode == 1 and all(f"- {outcome}: " in done.stdout for outcome in outcomes), done.stdout


def test_bad_arguments_end_in_words(
    tmp_path: Path, insightface_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    every = list(commands(tmp_path, insightface_root))
    assert len(every) > 500
    results = [(command[1][-1][:80], *answer(command)) for command in every[::37]]
    assert not [result for result in results if result[1] in ("raw", "late")]
    assert sum(outcome == "refused" for _, outcome, _ in results) > len(results) / 2
