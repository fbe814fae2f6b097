"""Whole runs: a made corpus, kills, one worker or two, other thresholds; by Ray and the face models."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from lab.corpus.__main__ import became, inputs, plant, scores, settings, table
from mm_core.curation.__main__ import main
from mm_core.curation.config import CurationConfig, Kind
from mm_core.curation.run import DROPPED, MEASURED, PAGE, curate
from mm_core.curation.workers import Workers
from mm_core.data.check import check_dataset
from mm_core.data.manifest import MANIFEST, read_manifest, read_picture
from mm_core.json_file import read_lines
from mm_core.pipelines.prompt import mark_identity

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def ray() -> Iterator[None]:
    """One Ray for all runs of this module that do not start their own."""
    with Workers(None, 2) as workers:
        workers.start()
        yield


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("corpus")


def config_of(kind: Kind, insightface_root: Path) -> CurationConfig:
    return settings(kind, insightface_root, "buffalo_sc")


@pytest.fixture(scope="module")
def pictures(ray: None, corpus: Path, insightface_root: Path) -> tuple[Path, dict[str, str]]:
    """The folder of a run that nothing disturbed, and what was planted."""
    truth = plant("pictures", corpus / "pictures", range(1))
    raw = inputs(corpus / "pictures" / "raw")
    curate("pictures", raw, corpus / "set", config_of("pictures", insightface_root), workers=1)
    return corpus / "set", truth


def test_every_rule_takes_what_was_planted_for_it(pictures: tuple[Path, dict[str, str]]) -> None:
    folder, truth = pictures
    found = became(folder)
    assert all(score[2:] == (1, 1) for score in scores(truth, found).values()), table(truth, found)
    samples = read_manifest(folder)
    assert [sample.id for sample in samples] == sorted(sample.id for sample in samples)
    assert {(sample.source, sample.licence) for sample in samples} == {("the one collection", "MIT")}
    report = check_dataset(folder, width=720, height=480, frames=1, fps=8, check_caption=mark_identity)
    assert len(report.usable) == len(samples) == 3 and not report.problems


def test_the_page_shows_counts_histograms_and_examples(pictures: tuple[Path, dict[str, str]]) -> None:
    page = (pictures[0] / PAGE).read_text()
    assert "3 of 24 pictures kept" in page and "--set keep.min_face_size=112" in page
    kept, dropped = page.partition("Kept, nearest to <code>min_face_size")[2].split("<h3>")[:2]
    assert all(name in kept for name in ("good.jpg", "turned.jpg", "grid.jpg")) and kept.count("data:image/jpeg") == 3
    assert "far.jpg" in dropped and dropped.count("data:image/jpeg") == 1
    assert re.search("<p>00000-corrupt.jpg: Cannot read", page) and "http" not in page


def test_other_thresholds_measure_nothing_again(
    pictures: tuple[Path, dict[str, str]], insightface_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor do they need Ray, as long as nothing new is kept."""
    folder, _ = pictures
    before = (folder / MANIFEST).read_bytes()
    config = config_of("pictures", insightface_root)
    raw = inputs(folder.parent / "pictures" / "raw")
    monkeypatch.setattr(Workers, "start", lambda self: pytest.fail("there is nothing to do"))
    assert curate("pictures", raw, folder, replace(config, keep=replace(config.keep, max_yaw=20.0))).kept == 2
    assert {line["rule"] for line in read_lines(folder / DROPPED) if "turned" in line["name"]} == {"yaw"}
    curate("pictures", raw, folder, config)
    assert (folder / MANIFEST).read_bytes() == before


def test_a_killed_run_and_two_workers_make_the_same(
    pictures: tuple[Path, dict[str, str]], insightface_root: Path, tmp_path: Path
) -> None:
    folder, _ = pictures
    raw = inputs(folder.parent / "pictures" / "raw")
    names = (f"measure.insightface_root={insightface_root}", "measure.face_pack=buffalo_sc", "keep.min_score=0.5")
    command = [*map(str, raw), "--out", str(tmp_path), "--workers", "1", "--set", *names]
    command = [sys.executable, "-m", "mm_core.curation", "pictures", *command]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    while not list((tmp_path / MEASURED).glob("*.jsonl")):
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    first = {path: path.stat().st_mtime_ns for path in (tmp_path / MEASURED).glob("*.jsonl")}
    curate("pictures", raw, tmp_path, config_of("pictures", insightface_root), workers=2)
    for name in (MANIFEST, DROPPED):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    assert all(path.stat().st_mtime_ns == at for path, at in first.items())
    assert {p.name for p in tmp_path.rglob("*.jpg")} == {p.name for p in (folder / "media").rglob("*.jpg")}


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The workers' code without Ray, which other tests have."""

    def each(self: Workers, work: Callable, arguments: tuple, tasks: list, on_progress: object) -> Iterator[dict]:
        done = work(*arguments) if isinstance(work, type) else lambda row: work(row, *arguments)
        yield from (json.loads(done({"task": json.dumps(task)})["result"]) for task in tasks)

    monkeypatch.setattr(Workers, "each", each)


def test_pairs_are_of_one_person_and_each_person_is_there_once(
    in_this_process: None, tmp_path: Path, photographs: Path, insightface_root: Path
) -> None:
    pairs = {"a": "person_a_1 person_a_2", "b": "person_b_1 person_b_2", "c": "person_b_2 person_b_1"}
    pairs |= {"stranger": "impostor_1 person_a_2", "alone": "impostor_2"}
    raw, folder = tmp_path / "raw", tmp_path / "set"
    raw.mkdir()
    for name, photos in pairs.items():
        for file, photo in zip((f"{name}.jpg", f"{name}.reference.jpg"), photos.split()):
            shutil.copyfile(photographs / f"{photo}.jpg", raw / file)
        (raw / f"{name}.txt").write_text("A person looks into the camera.")
    config = config_of("pictures", insightface_root)
    low = dict(min_lines=200, min_face_size=60.0, min_pair_cosine=0.4, same_identity=0.4, max_text=100.0)
    curate("pairs", [raw], folder, replace(config, keep=replace(config.keep, **low)))
    dropped = {line["name"]: line["rule"] for line in read_lines(folder / DROPPED)}
    repeated = dropped.keys() & {"b.jpg", "c.jpg"}
    assert len(repeated) == 1
    assert dropped == {"stranger.jpg": "pair", "alone.jpg": "reference", repeated.pop(): "identity"}
    samples = {(folder / sample.media).read_bytes(): sample for sample in read_manifest(folder)}
    a = samples[(photographs / "person_a_1.jpg").read_bytes()]
    assert (folder / a.references[0]).read_bytes() == (photographs / "person_a_2.jpg").read_bytes()
    assert len({sample.person for sample in samples.values()}) == 2


def test_portraits_are_bordered_and_need_no_caption(
    in_this_process: None, tmp_path: Path, photographs: Path, insightface_root: Path
) -> None:
    shutil.copyfile(photographs / "person_b_1.jpg", tmp_path / "1.jpg")
    config = config_of("pictures", insightface_root)
    low = dict(min_lines=200, min_face_size=60.0, max_text=100.0)  # letters are on the wall behind her
    config = replace(config, keep=replace(config.keep, **low))
    curate("portraits", [tmp_path / "1.jpg"], tmp_path / "set", config)
    (sample,) = read_manifest(tmp_path / "set")
    assert sample.caption == "A squared ID photo of a person img, with pure black on two sides."
    assert sample.references == (sample.media,)
    height, width = read_picture(tmp_path / "set", sample.media).shape[:2]
    assert width == round(1.5 * height)
    curate("portraits", [tmp_path / "1.jpg"], tmp_path / "set", replace(config, width=960))
    (sample,) = read_manifest(tmp_path / "set")
    assert read_picture(tmp_path / "set", sample.media).shape[1] == 2 * height


def test_mistakes_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "1.jpg").write_bytes(b"")
    out = ["--out", str(tmp_path.parent / "set")]
    for command, said in (
        (["pictures", str(tmp_path / "none"), *out], "holds nothing to look at"),
        (["pictures", str(tmp_path), "--out", str(tmp_path / "set")], "lies in the input"),
        (["pictures", str(tmp_path), *out, "--workers", "0"], "workers is 0"),
        (["pictures", str(tmp_path), *out, "--set", "keep.min_lines=x"], "keep.min_lines is 'x'"),
        (["pictures", str(tmp_path), *out, "--set", f"measure.insightface_root={tmp_path}"], "unzip it there\n"),
    ):
        assert main(command) == 2
        assert said in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "imagehash", None)
    assert main(["pictures", str(tmp_path), *out]) == 2
    assert '(imagehash): python -m pip install ".[training,data]"' in capsys.readouterr().err
