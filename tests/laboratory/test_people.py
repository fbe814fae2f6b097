"""Rendered people: the same every time, different from one another, and as their captions say."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from lab.people import shards
from lab.people.__main__ import main
from lab.people.captions import TRIGGER, caption, nod, tilt, turn
from lab.people.expressions import EXPRESSIONS, blended
from lab.people.geometry import HEAD_FILE, Material, load_head
from lab.people.person import Person
from lab.people.raster import NOTHING, Cutout, rasterize
from lab.people.render import render_clip
from lab.people.scene import COLOURS, ClipDescription, sample_clip
from lab.people.shards import RenderSettings, read_clips, render_dataset
from lab.people.traits import HELD_OUT, PersonTraits, sample_traits
from mm_core.errors import CheckpointError, SettingError
from mm_core.faces.analysis import Face, FaceAnalyzer, select_face

SMALL = 32
FIRST_OF_TWO_SHARDS = shards.PEOPLE_PER_SHARD - 1


@pytest.fixture(scope="module")
def analyzer(insightface_root: Path) -> FaceAnalyzer:
    return FaceAnalyzer(insightface_root, "buffalo_sc", device="cpu")


@cache
def person(seed: int) -> Person:
    return Person.from_seed(seed)


def still(seed: int, **changes: object) -> ClipDescription:
    """A clip that faces the camera and keeps a neutral face, with changes."""
    neutral = {"yaw": (0.0, 0.0), "pitch": (0.0, 0.0), "roll": (0.0, 0.0), "expressions": ("neutral", "neutral")}
    return dataclasses.replace(sample_clip(seed, 0), **neutral | changes)


def clips_where(condition: Callable[[ClipDescription], bool], count: int) -> Iterator[ClipDescription]:
    """The first sampled clips that fulfil a condition, each of another person."""
    clips = (sample_clip(seed, 0) for seed in itertools.count())
    return itertools.islice((clip for clip in clips if condition(clip)), count)


def ends(analyzer: FaceAnalyzer, clip: ClipDescription) -> tuple[Face, Face]:
    """The face in the first and in the last frame."""
    frames = render_clip(person(clip.person.seed), clip)
    return tuple(select_face(analyzer.detect(frames[index]), "largest") for index in (0, -1))


def nose_offset(face: Face) -> float:
    """Of the nose from the middle of the eyes, to the picture's right, in eye distances."""
    left, right, nose = face.landmarks[:3]
    return float((nose - (left + right) / 2)[0] / np.linalg.norm(right - left))


def mouth_width(face: Face) -> float:
    """In eye distances."""
    left, right, _, mouth_left, mouth_right = face.landmarks
    return float(np.linalg.norm(mouth_right - mouth_left) / np.linalg.norm(right - left))


# ---------------------------------------------------------------- rasteriser


def test_zbuffer_equals_brute_force() -> None:
    generator = np.random.default_rng(0)
    width, height = 24, 20
    points = generator.uniform(-4, 28, (40, 3)).astype(np.float32)
    triangles = generator.integers(0, len(points), (25, 3)).astype(np.int32)
    found = rasterize(points, triangles, width, height, Cutout.none(len(points)))
    compared = 0
    for row, column in itertools.product(range(height), range(width)):
        nearest, depth, clear = brute_force(points.astype(float), triangles, column + 0.5, row + 0.5)
        if clear:
            assert found.triangle[row, column] == nearest
            compared += 1
            if nearest != NOTHING:
                assert found.depth[row, column] == pytest.approx(depth, abs=1e-3)
    assert compared > 0.95 * width * height


def brute_force(points: np.ndarray, triangles: np.ndarray, x: float, y: float) -> tuple[int, float, bool]:
    """The nearest triangle, its depth, and whether no edge is too close to tell."""
    nearest, depth, clear = NOTHING, -np.inf, True
    for index, corners in enumerate(triangles):
        system = np.vstack([points[corners, :2].T, np.ones(3)])
        if abs(np.linalg.det(system)) < 1e-6:
            continue
        weights = np.linalg.solve(system, [x, y, 1])
        clear &= abs(weights.min()) > 1e-4
        z = float(weights @ points[corners, 2])
        if weights.min() >= 0 and z > depth:
            nearest, depth = index, z
    return nearest, depth, clear


def test_cutout_keeps_what_rises_above_the_threshold() -> None:
    points = np.float32([[0, 0, 1], [8, 0, 1], [8, 8, 1], [0, 8, 1]])
    triangles = np.int32([[0, 1, 2], [0, 2, 3]])
    heights = np.zeros((8, 8), np.float32)
    heights[:, 4:] = 1
    cutout = Cutout(points[:, :2].copy(), heights, np.full(4, 0.5, np.float32))
    covered = rasterize(points, triangles, 8, 8, cutout).triangle != NOTHING
    assert covered[:, 4:].all() and not covered[:, :4].any()


def test_head_is_packaged_and_whole() -> None:
    head = load_head()
    assert HEAD_FILE.stat().st_size < 2e6
    assert np.isfinite(head.rest).all()
    assert head.triangles.max() < len(head.rest) == len(head.openness)
    # Left and right are alike: what is painted on both sides needs it.
    eyes = head.rest[head.vertex_materials == Material.EYE]
    assert eyes[:, 0].min() == pytest.approx(-eyes[:, 0].max(), abs=1e-3)


# ---------------------------------------------------------------- determinism


def test_a_seed_is_a_person_and_a_clip() -> None:
    clip = sample_clip(3, 1, size=SMALL)
    first = render_clip(Person.from_seed(3), clip)
    again = render_clip(Person.from_seed(3), sample_clip(3, 1, size=SMALL))
    assert first.shape == (9, SMALL, SMALL, 3) and first.dtype == np.uint8
    assert np.array_equal(first, again)
    assert caption(clip) == caption(sample_clip(3, 1, size=SMALL))


def test_seeds_and_clips_differ() -> None:
    frames = [render_clip(person(seed), sample_clip(seed, clip, size=SMALL)) for seed, clip in ((3, 0), (3, 1), (4, 0))]
    for one, other in itertools.combinations(frames, 2):
        assert np.abs(one.astype(int) - other).mean() > 5
    assert len({sample_traits(seed) for seed in range(200)}) == 200


def test_length_and_size_change_nothing_else() -> None:
    short, long = sample_clip(3, 0), sample_clip(3, 0, frames=17, size=128)
    assert dataclasses.replace(long, frames=9, size=64) == short
    assert caption(short) == caption(long)
    with pytest.raises(ValueError, match="8N"):
        sample_clip(3, 0, frames=13)


def test_the_number_of_processes_changes_no_bit(tmp_path: Path) -> None:
    settings = RenderSettings(first=FIRST_OF_TWO_SHARDS, stop=FIRST_OF_TWO_SHARDS + 2, clips=1, size=SMALL)
    for processes in (1, 2):
        render_dataset(tmp_path / str(processes), settings, processes)
    names = [path.name for path in sorted((tmp_path / "1").iterdir())]
    assert len([name for name in names if name.endswith(".npz")]) == 2
    assert names == [path.name for path in sorted((tmp_path / "2").iterdir())]
    for name in names:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_the_person_must_be_the_clips() -> None:
    with pytest.raises(ValueError, match="person 4"):
        render_clip(person(3), sample_clip(4, 0))


# ---------------------------------------------------------------- descriptions and captions


def test_description_survives_json() -> None:
    clip = sample_clip(5, 2)
    assert ClipDescription.from_json(json.loads(json.dumps(clip.to_json()))) == clip


def test_captions_name_what_is_there() -> None:
    for seed in range(300):
        clip = sample_clip(seed, 0)
        words = caption(clip)
        assert words.count(f" {clip.person.sex} {TRIGGER}") == 1
        assert f"{clip.clothes} {clip.garment}" in words
        assert f"{clip.background} background" in words or f"{clip.background} wall" in words
        others = set(COLOURS) - {clip.clothes, clip.background}
        assert not any(f"a {colour} {noun}" in words for colour in others for noun in ("T-shirt", "turtleneck", "wall"))
        assert ("bearded" in words or "a beard" in words) == (clip.person.beard == "beard")
        assert ("glasses" in words) == clip.person.glasses
        assert ("turns" in words) == bool(turn(clip))
        assert ("tilts the head" in words) == bool(tilt(clip))
        nods = ("raises the head", "lifts the chin", "lowers the head")
        assert bool(nod(clip)) == any(words_of_nod in words for words_of_nod in nods)
        first, last = clip.expressions
        assert ("frown" in words) == ("frown" in (first, last))
        assert any(word in words for word in ("closes the eyes", "shuts the eyes")) == (last == "closed eyes" != first)
    assert len({caption(sample_clip(seed, 0)) for seed in range(300)}) > 290


def test_movements_are_clear_or_absent() -> None:
    for seed in range(300):
        clip = sample_clip(seed, 1)
        for path, told in ((clip.yaw, turn(clip)), (clip.pitch, nod(clip)), (clip.roll, tilt(clip))):
            assert bool(told) == (abs(path[1] - path[0]) > 8)
            assert told or abs(path[1] - path[0]) <= 3


@pytest.mark.parametrize("direction", ["left", "right"])
def test_turns_are_the_viewers(analyzer: FaceAnalyzer, direction: str) -> None:
    for clip in clips_where(lambda clip: turn(clip) == direction, 3):
        assert direction in caption(clip)
        first, last = ends(analyzer, clip)
        moved = nose_offset(last) - nose_offset(first)
        assert moved < -0.15 if direction == "left" else moved > 0.15


def test_nods_and_tilts_are_seen(analyzer: FaceAnalyzer) -> None:
    first, last = ends(analyzer, still(7, pitch=(-10.0, 10.0)))
    height = [(face.landmarks[2] - face.landmarks[:2].mean(0))[1] / face.size for face in (first, last)]
    assert height[1] < height[0] - 0.02  # a raised head brings the nose nearer to the eyes
    first, last = ends(analyzer, still(7, roll=(-8.0, 8.0)))
    assert tilt(still(7, roll=(-8.0, 8.0))) == "right"
    assert last.roll - first.roll == pytest.approx(16, abs=5)


def test_smiles_widen_the_mouth(analyzer: FaceAnalyzer) -> None:
    growth = []
    for seed, last in ((6, "smile"), (10, "grin"), (13, "grin"), (16, "smile")):  # none with a beard over the lips
        clip = still(seed, expressions=("neutral", last))
        assert any(word in caption(clip) for word in ("smile", "grins", "smiles"))
        before, after = ends(analyzer, clip)
        growth.append(mouth_width(after) / mouth_width(before))
    assert min(growth) > 1.03 and np.mean(growth) > 1.1


def test_closed_eyes_are_seen(analyzer: FaceAnalyzer) -> None:
    clip = still(8, size=128, expressions=("neutral", "closed eyes"))
    frames = render_clip(person(8), clip)
    face = select_face(analyzer.detect(frames[0]), "largest")
    eyes = [frames[:, int(y) - 3 : int(y) + 4, int(x) - 5 : int(x) + 6].astype(float) for x, y in face.landmarks[:2]]
    for eye in eyes:
        assert eye[-1].std() < 0.75 * eye[0].std()


def test_mouth_and_brows_move_as_named() -> None:
    head, someone = load_head(), person(8)
    mouth = (head.lips > 0.5) & (np.abs(head.rest[:, 0]) < 0.05)
    brows = (head.vertex_materials == Material.SKIN) & (np.abs(head.rest[:, 1] - 7.5) < 0.05) & (head.rest[:, 2] > 1.3)

    def heights(expression: str) -> tuple[float, float]:
        positions = someone.head_positions(blended(expression, expression, 1.0))
        return float(np.ptp(positions[mouth, 1])), float(positions[brows, 1].mean())

    calm_mouth, calm_brows = heights("neutral")
    assert heights("open mouth")[0] > calm_mouth + 0.15
    assert heights("raised brows")[1] > calm_brows + 0.02
    assert heights("frown")[1] < calm_brows - 0.02
    assert set(EXPRESSIONS) >= {"smile", "grin", "pout"}


# ---------------------------------------------------------------- what a recogniser sees


def test_faces_are_found_and_told_apart(analyzer: FaceAnalyzer) -> None:
    embeddings, people, missed = [], [], 0
    for seed in range(100, 108):
        for clip in (0, 1):
            frames = render_clip(person(seed), sample_clip(seed, clip))
            for frame in (frames[0], frames[-1]):
                faces = analyzer.detect(frame)
                missed += not faces
                embeddings += [select_face(faces, "largest").normed_embedding] if faces else []
                people += [seed] if faces else []
    assert missed == 0
    cosines, people = np.array(embeddings) @ np.array(embeddings).T, np.array(people)
    same = cosines[(people[:, None] == people) & ~np.eye(len(people), dtype=bool)]
    different = cosines[people[:, None] != people]
    assert same.mean() > different.mean() + 0.3
    assert np.quantile(same, 0.1) > np.quantile(different, 0.9)


def test_held_out_people_need_permission(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    people = f"{HELD_OUT}:{HELD_OUT + 1}"
    assert main(["render", "--people", people, "--out", str(tmp_path / "people")]) == 2
    assert "--held-out" in capsys.readouterr().err
    assert not (tmp_path / "people").exists()
    with pytest.raises(SettingError, match="reach over"):
        RenderSettings(first=HELD_OUT - 1, stop=HELD_OUT + 1, clips=1)
    assert sample_traits(HELD_OUT).held_out and not sample_traits(HELD_OUT - 1).held_out


# ---------------------------------------------------------------- shards


def test_a_killed_run_continues(tmp_path: Path, repository: Path) -> None:
    folder = tmp_path / "people"
    first, stop = FIRST_OF_TWO_SHARDS, FIRST_OF_TWO_SHARDS + 5
    command = [sys.executable, "-m", "lab.people", "render", f"--people={first}:{stop}", "--processes=1"]
    command += ["--clips=1", f"--size={SMALL}", "--out", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    running = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while not list(folder.glob("*.npz")) and time.monotonic() < until:
        time.sleep(0.02)
    running.kill()
    running.wait()
    (finished,) = folder.glob("*.npz")
    written = finished.stat().st_mtime_ns
    (folder / f".left{shards.PARTIAL}").touch()

    settings = RenderSettings(first=first, stop=stop, clips=1, size=SMALL)
    reports: list[tuple[int, int]] = []
    render_dataset(folder, settings, 1, lambda people, new: reports.append((people, new)))
    assert reports == [(1, 0), (4, 1)]
    assert finished.stat().st_mtime_ns == written
    assert not list(folder.glob(f".*{shards.PARTIAL}"))
    clips = list(read_clips(folder))
    assert [clip.description.person.seed for clip in clips] == list(range(first, stop))
    expected = sample_clip(stop - 1, 0, size=SMALL)
    assert clips[-1].description == expected and clips[-1].caption == caption(expected)
    assert np.array_equal(clips[-1].frames, render_clip(person(stop - 1), expected))


def test_a_folder_holds_one_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "write_shard", lambda task: 1)
    settings = RenderSettings(first=0, stop=20, clips=1)
    render_dataset(tmp_path, settings, 1)
    for change, message in (({"size": 128}, "size 64"), ({"stop": 10}, "up to 20"), ({"stop": 40}, "cannot grow")):
        with pytest.raises(SettingError, match=message):
            render_dataset(tmp_path, dataclasses.replace(settings, **change), 1)
    with pytest.raises(SettingError, match="holds no rendered people"):
        next(read_clips(tmp_path / "elsewhere"))
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"settings.json is damaged"):
        render_dataset(tmp_path, settings, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"stop": 0}, "are none"), ({"clips": 0}, "1 or more"), ({"frames": 13}, "8N"), ({"size": 60}, "multiple of 8")],
)
def test_settings_name_the_remedy(change: dict[str, int], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        RenderSettings(**{"first": 0, "stop": 4, "clips": 1} | change)


def test_sheet(tmp_path: Path) -> None:
    assert main(["sheet", "--people", "0:1", "--out", str(tmp_path / "sheet.png"), "--size", "32", "--clips", "1"]) == 0
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")


def test_traits_are_spread() -> None:
    people: list[PersonTraits] = [sample_traits(seed) for seed in range(500)]
    assert 0.4 < np.mean([someone.sex == "man" for someone in people]) < 0.6
    assert all(someone.beard == "none" for someone in people if someone.sex == "woman")
    assert {someone.age_group for someone in people} == {"young", "middle-aged", "old"}


def test_the_prompt_parser_finds_the_person() -> None:
    prompt = pytest.importorskip("mm_core.pipelines.prompt", exc_type=ImportError)
    for seed in range(20):
        clip = sample_clip(seed, 0)
        assert prompt.mark_identity(caption(clip)).noun == clip.person.sex


@pytest.mark.parametrize("package", ["numba", "scipy", "cv2"])
def test_without_a_package_the_command_says_what_to_install(package: str, tmp_path: Path) -> None:
    code = (
        f"import sys; sys.modules[{package!r}] = None; from lab.people.__main__ import main; sys.exit(main())"
    )
    command = ["render", "--people", "0:1", "--out", str(tmp_path / "people")]
    result = subprocess.run(
        [sys.executable, "-c", code, *command],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert package in result.stderr and "pip install numba scipy opencv-python" in result.stderr
