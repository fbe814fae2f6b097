"""The command line on a folder of real videos, one of them corrupt."""

from __future__ import annotations

import base64
import csv
import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest

from mm_core.evaluation import __main__ as command
from mm_core.evaluation.plot import similarity_plot
from mm_core.video import write_video

SVG = "{http://www.w3.org/2000/svg}"
FLAT = np.full((320, 250, 3), 120, np.uint8)


@pytest.fixture
def folders(tmp_path, photographs, photos) -> Path:
    """References of two people; a good clip, a swapped one, one without faces, a stranger's and a corrupt one."""
    for name in ("person_a", "person_b"):
        (tmp_path / "references" / name).mkdir(parents=True)
        for photo in photographs.glob(f"{name}_*.jpg"):
            shutil.copy(photo, tmp_path / "references" / name)
    clips = {
        "person_a_still": [photos["person_a_2"]] * 5,
        "person_b/swap": [photos["person_b_1"]] * 3 + [photos["person_a_2"]] * 3,
        "person_b/<wall>": [FLAT] * 2,
        "stranger": [FLAT],
    }
    for name, frames in clips.items():
        write_video(tmp_path / "videos" / f"{name}.mp4", np.stack(frames), 8)
    whole = (tmp_path / "videos" / "person_a_still.mp4").read_bytes()
    (tmp_path / "videos" / "person_a_corrupt.mp4").write_bytes(whole[: len(whole) // 3])
    return tmp_path


def arguments(folder: Path, insightface_root: Path) -> list[str]:
    return [
        *("--videos", str(folder / "videos"), "--references", str(folder / "references"), "--out", str(folder / "out")),
        *("--insightface-root", str(insightface_root), "--face-pack", "buffalo_sc"),
    ]


def test_a_folder_end_to_end(folders, insightface_root, repository):
    run = subprocess.run(
        [sys.executable, "-m", "mm_core.evaluation", "score", *arguments(folders, insightface_root)],
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 1, run.stderr
    assert "3 videos measured, 2 not" in run.stdout
    assert "not measured: person_a_corrupt.mp4: cannot read the video" in run.stderr
    assert "Traceback" not in run.stderr
    out = folders / "out"
    assert sorted(path.name for path in out.iterdir()) == ["report.html", "results.csv", "results.json"]

    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    clips = {clip["video"]: clip for clip in results["clips"]}
    assert [left_out["video"] for left_out in results["skipped"]] == [
        "person_a_corrupt.mp4",
        "stranger.mp4",
    ]
    assert clips["person_a_still.mp4"]["scores"]["id_similarity"] > 0.8
    assert clips["person_a_still.mp4"]["scores"]["identity_accepted"] is True
    assert abs(clips["person_a_still.mp4"]["scores"]["id_decay"]) < 0.02
    assert clips["person_b/swap.mp4"]["scores"]["id_decay"] > 0.7
    assert clips["person_b/<wall>.mp4"]["similarity"] == [None, None]
    assert clips["person_b/<wall>.mp4"]["scores"]["id_similarity"] is None
    assert results["summary"]["clips"] == 3
    assert results["summary"]["measured"]["id_similarity"] == 2
    assert results["settings"] == {
        "face_pack": "buffalo_sc", "threshold": 0.25, "centred": False, "flow": "DIS", "clip": None,
        "judges": ["dlib", "sface"],
    }  # fmt: skip
    assert clips["person_a_still.mp4"]["scores"]["text_alignment"] is None

    with (out / "results.csv").open(encoding="utf-8", newline="") as file:
        rows = {row["video"]: row for row in csv.DictReader(file)}
    assert float(rows["person_b/swap.mp4"]["id_decay"]) == clips["person_b/swap.mp4"]["scores"]["id_decay"]
    assert rows["person_b/<wall>.mp4"]["id_similarity"] == ""
    check_page((out / "report.html").read_text(encoding="utf-8"))


def check_page(page: str) -> None:
    assert "&lt;wall&gt;" in page and "<wall>" not in page
    assert page.count("data:image/svg+xml;base64,") == 3
    assert page.count("data:image/jpeg;base64,") == 3 + 3 + 3  # a reference each, three worst frames of two clips
    assert not re.search(r'(src|href)="(?!data:|#)', page)  # nothing from outside
    assert "2 not measured" in page


def test_mistakes_are_told_and_nothing_is_written(folders, insightface_root, capsys):
    missing = arguments(folders, insightface_root)
    missing[1] = str(folders / "nowhere")
    assert command.main(["score", *missing]) == 2
    assert "nowhere does not exist" in capsys.readouterr().err
    assert not (folders / "out").exists()
    with pytest.raises(SystemExit):
        command.main(["score", *arguments(folders, insightface_root), "--threshold", "25"])


@pytest.fixture
def without_judges(monkeypatch) -> None:
    """Their networks take seconds to load."""
    monkeypatch.setattr("mm_core.evaluation.recognisers.other_judges", lambda: [])


def test_all_bad_videos_still_make_a_report(folders, insightface_root, capsys, without_judges):
    for path in (folders / "videos").rglob("*.mp4"):
        path.write_bytes(b"no video")
    assert command.main(["score", *arguments(folders, insightface_root)]) == 1
    assert "0 videos measured, 5 not" in capsys.readouterr().out
    assert json.loads((folders / "out" / "results.json").read_text(encoding="utf-8"))["summary"] is None


def test_centring_is_on_request(folders, insightface_root, without_judges, photos):
    for path in [*(folders / "videos").glob("person_b/*"), *(folders / "videos").glob("*[!l].mp4")]:
        path.unlink()  # all but person_a_still
    write_video(folders / "videos" / "person_a_still.mp4", photos["person_a_2"][None], 8)
    argv = ["score", *arguments(folders, insightface_root), "--centre", str(folders / "references")]
    assert command.main(argv) == 0
    results = json.loads((folders / "out" / "results.json").read_text(encoding="utf-8"))
    assert results["settings"]["centred"] is True


def test_the_plot_breaks_where_there_is_no_face(monkeypatch):
    url = similarity_plot(np.array([0.9, 0.8, np.nan, 0.7, -0.9]), 0.25).split("base64,")[1].split('"')[0]
    svg = ElementTree.fromstring(base64.b64decode(url))
    style = "stroke: #1565c0; stroke-width: 1.5"
    curves = [path.get("d") for path in svg.iter(f"{SVG}path") if style in path.get("style", "")]
    assert [(curve.count("M"), curve.count("L")) for curve in curves] == [(2, 2)]  # two pieces of two points
    assert "#b00020" in base64.b64decode(url).decode()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install matplotlib" in similarity_plot(np.array([0.9]), 0.25)
