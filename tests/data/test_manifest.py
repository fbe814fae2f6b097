"""Manifests, the media they name, and the check that finds everything wrong with them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lab.people.__main__ import main
from lab.people.shards import RenderSettings, render_dataset
from mm_core.data.check import Report, check_dataset
from mm_core.data.framing import place
from mm_core.data.manifest import MANIFEST, read_manifest, read_media, read_picture
from mm_core.errors import SampleError, SettingError
from mm_core.pipelines.prompt import mark_identity
from mm_core.video import write_video

LINE = {"id": "a", "media": "a.png", "caption": "A man reads.", "references": ["a.png"]}


def write(folder: Path, *lines: dict | str) -> Path:
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    return folder


def gradient(frames: int, height: int, width: int) -> np.ndarray:
    """Red grows to the right, green downwards, blue with time."""
    clip = np.zeros((frames, height, width, 3), np.uint8)
    clip[..., 0] = np.linspace(0, 255, width)
    clip[..., 1] = np.linspace(0, 255, height)[:, None]
    clip[..., 2] = np.linspace(0, 255, frames)[:, None, None]
    return clip


def picture(path: Path, height: int = 64, width: int = 64) -> None:
    Image.fromarray(gradient(1, height, width)[0]).save(path)


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two people in three clips of 9 frames."""
    folder = tmp_path_factory.mktemp("people")
    render_dataset(folder, RenderSettings(first=0, stop=2, clips=3), processes=1)
    return folder


def check(folder: Path, frames: int = 1) -> Report:
    return check_dataset(folder, width=64, height=64, frames=frames, fps=8, check_caption=mark_identity)


def test_a_manifest_reads_back(tmp_path: Path) -> None:
    samples = read_manifest(write(tmp_path, LINE | {"person": "p"}, "", LINE | {"id": "b", "references": ["c.mp4@4"]}))
    assert [(s.id, s.person, s.references) for s in samples] == [("a", "p", ("a.png",)), ("b", None, ("c.mp4@4",))]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "no JSON"),
        ("[]", "no JSON object"),
        (LINE | {"id": 3}, "id is 3"),
        ({"id": "b"}, "missing media, references"),
        (LINE | {"colour": "red"}, "unknown colour"),
        (LINE | {"id": "b", "references": []}, "references is empty"),
        (LINE | {"id": "b", "references": ["clip.mp4"]}, "clip.mp4@0"),
        (LINE | {"id": "b", "references": [3]}, "is no picture"),
        (LINE, "that of line 1 too"),
        (LINE | {"id": "b", "media": "../a.png"}, "leads out"),
        (LINE | {"id": "b", "media": "/a.png"}, "leads out"),
        (LINE | {"id": "b", "media": "C:\\a.png"}, "leads out"),
        (LINE | {"id": "b", "media": "a.gif"}, "'a.gif' is no"),
        (LINE | {"id": "b", "media": "a.npz"}, "is no .png"),
        (LINE | {"id": "b", "media": "a.png@1"}, "no frames"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: dict | str, said: str) -> None:
    with pytest.raises(SettingError, match=f"line 2: .*{said}"):
        read_manifest(write(tmp_path, LINE, line))


def test_no_manifest_and_no_sample(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="There is no"):
        read_manifest(tmp_path)
    with pytest.raises(SettingError, match="no sample"):
        read_manifest(write(tmp_path))


def test_media_of_every_kind(tmp_path: Path) -> None:
    clip = gradient(9, 64, 64)
    picture(tmp_path / "a.png")
    write_video(tmp_path / "a.mp4", clip, 8, quality=100)
    assert np.array_equal(read_media(tmp_path, "a.png")[0], clip[0])
    assert np.abs(read_media(tmp_path, "a.mp4").astype(int) - clip).mean() < 3
    assert len(read_media(tmp_path, "a.mp4", 5)) == 5
    assert np.array_equal(read_picture(tmp_path, "a.mp4@4"), read_media(tmp_path, "a.mp4")[4])
    for path, kind in (("a.mp4@9", "missing frame"), ("b.png", "missing file"), ("a.mp4", "no picture")):
        with pytest.raises(SampleError) as caught:
            read_picture(tmp_path, path)
        assert caught.value.kind == kind


@pytest.mark.parametrize(
    ("size", "face", "columns", "rows"),
    [
        ((256, 128), (118, 50, 138, 80), (64, 191), (0, 255)),  # the head is in the middle half: that is what is left
        ((256, 128), (200, 50, 220, 80), (98, 225), (0, 255)),  # the crop goes along, as far as the ear needs it
        ((256, 128), (236, 50, 256, 80), (128, 255), (0, 255)),  # and not beyond the picture
        ((64, 256), (2, 20, 62, 90), (0, 255), (0, 255)),  # the head is taller than the crop: all of it, padded
    ],
)
def test_other_sizes_are_cropped_around_the_head_or_padded(
    size: tuple[int, int], face: tuple[int, ...], columns: tuple[int, int], rows: tuple[int, int]
) -> None:
    """What is seen of a gradient, which is 0 to 255 from left to right in red and from top to bottom in green."""
    frames, boxes = gradient(2, size[1], size[0]), np.array([face], float)
    placement = place(size, (64, 64), boxes, "clip")
    placed = placement.applied(frames, 64, 64).astype(int)
    seen = placed[0][:, placed[0].any(axis=(0, 2))]
    assert placed.shape == (2, 64, 64, 3) and seen.shape[1] == (16 if size[0] == 64 else 64)
    assert np.allclose(seen[32, [0, -1], 0], columns, atol=9) and np.allclose(seen[[0, -1], 8, 1], rows, atol=4)
    middle = placement.moved(boxes.reshape(2, 2)).mean(axis=0).round().astype(int)  # the same colour, where it went
    there = [(face[0] + face[2]) * 255 / 2 / size[0], (face[1] + face[3]) * 255 / 2 / size[1]]
    assert np.allclose(placed[0, middle[1], middle[0], :2], there, atol=12)


def test_a_square_portrait_keeps_hair_and_chin() -> None:
    """1024 px of which the face is half, to the size that CogVideoX makes: its centre crop would have 683 rows."""
    placement = place((1024, 1024), (720, 480), np.array([[256, 300, 768, 900]]), "portrait.png")
    assert (placement.scale, placement.left, placement.top) == (480 / 1024, 120.0, 0.0)
    with pytest.raises(SampleError, match="63 x 63 px, less than the 64 x 64"):
        place((63, 63), (64, 64), np.zeros((1, 4)), "small.png")
    assert place((63, 64), (64, 64), np.array([[20, 20, 40, 40]]), "narrow.png").scale == 1


def test_everything_wrong_is_counted(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "large.png", 100, 150)
    picture(tmp_path / "small.png", 32, 50)
    whole = (tmp_path / "large.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "cut.mp4").write_bytes(b"no video")
    media = ["large.png", "small.png", "cut.png", "cut.mp4", "none.png"]
    lines = [LINE | {"id": f"m{i}", "media": name} for i, name in enumerate(media)]
    lines += [LINE | {"id": "c1", "caption": ""}, {k: v for k, v in LINE.items() if k != "caption"} | {"id": "c2"}]
    lines += [LINE | {"id": "c3", "caption": "A house."}, LINE | {"id": "r1", "references": ["cut.png"]}]
    lines += [LINE | {"id": "r2", "references": ["none.png", "a.png"]}, LINE, LINE, "{"]
    report = check(write(tmp_path, *lines))
    assert report.usable == ["m0", "r2", "a"]
    assert {kind: len(reasons) for kind, reasons in report.problems.items()} == {
        "manifest": 2,
        "too small": 1,
        "corrupt file": 2,
        "missing file": 1,
        "no caption": 2,
        "caption": 1,
        "reference: corrupt file": 1,
        "reference: missing file": 1,
        "no usable reference": 1,
    }
    assert report.samples == len(lines) and len(report.scaled) == 1
    assert "3 of 13 samples can be used" in str(report) and "line 2 (m1)" in str(report)
    assert report.to_json()["problems"]["corrupt file"]["count"] == 2
    assert json.loads(json.dumps(report.to_json()))["usable"] == report.usable


def test_clips_that_are_too_short_or_too_fast(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    for frames in (5, 9):
        write_video(tmp_path / f"{frames}.mp4", gradient(frames, 64, 64), 8)
        write_video(tmp_path / f"{frames}.webm", gradient(frames, 64, 64), 8, format="webm")
    write_video(tmp_path / "fast.mp4", gradient(9, 64, 64), 25)
    media = ["5.mp4", "9.mp4", "5.webm", "9.webm", "fast.mp4", "9.mp4@0", "a.png"]
    report = check(write(tmp_path, *[LINE | {"id": name, "media": name} for name in media]), frames=9)
    assert report.usable == ["9.mp4", "9.webm", "fast.mp4"]
    assert len(report.problems["too few frames"]) == 4
    assert [said.endswith("(fast.mp4): 25 frames a second, not 8") for said in report.other_rate] == [True]
    assert report.other_rate[0] in str(report)


def test_rendered_people_as_a_data_set(people: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["manifest", "--out", str(people)]) == 0
    assert main(["manifest", "--out", str(people), "--frames", "1"]) == 0
    assert "images.jsonl: 6 samples" in capsys.readouterr().out
    clips, pictures = read_manifest(people), read_manifest(people / "images.jsonl")
    assert [sample.id for sample in clips] == ["0-0", "0-1", "0-2", "1-0", "1-1", "1-2"]
    for sample in (*clips, *pictures):
        own = sample.media.split("@")[0]
        seen = {reference.split("@")[0] for reference in sample.references}
        assert seen == {f"clips/{sample.person}-{number}.mkv" for number in range(3)} - {own}
    shard = np.load(people / "people-00000000-00000002.npz")["frames"]
    assert np.array_equal(read_media(people, "clips/1-1.mkv"), shard[4])
    assert len({reference for sample in clips for reference in sample.references}) == 6
    assert len({sample.media for sample in pictures}) == 6
    assert check(people, frames=9).usable == [sample.id for sample in clips]
    assert check(people / "images.jsonl").usable == [sample.id for sample in pictures]
    before = (people / MANIFEST).read_bytes()
    assert main(["manifest", "--out", str(people)]) == 0
    assert (people / MANIFEST).read_bytes() == before
