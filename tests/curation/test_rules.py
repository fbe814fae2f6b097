"""Inputs, rules and neighbours by themselves: no models, no processes."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from mm_core.curation import neighbours
from mm_core.curation.__main__ import main
from mm_core.curation.clips import Footage
from mm_core.curation.config import CurationConfig, Keeping, Measuring, settings_of_model
from mm_core.curation.items import Item, read, shards_of
from mm_core.curation.measure import packed, spread
from mm_core.curation.page import render_page
from mm_core.curation.rules import judged, marked, portrait_caption, rules
from mm_core.curation.tally import Tally
from mm_core.curation.write import bordered, samples
from mm_core.data.check import check_dataset
from mm_core.data.manifest import MANIFEST, PICTURES, read_manifest
from mm_core.errors import SampleError, SettingError
from mm_core.files import write_lines
from mm_core.pipelines.presets import PRESETS
from mm_core.pipelines.prompt import mark_identity
from mm_core.settings_file import load_settings

FACE = {"score": 0.8, "size": 200.0, "yaw": 5.0, "pitch": 0.0, "roll": 2.0, "sharpness": 300.0}
ROW = {
    "name": "a.jpg",
    "id": "a",
    "size": [800, 900],
    "hash": "00" * 32,
    "caption": "A man reads.",
    "source": None,
    "licence": None,
    "text": 0.0,
    "looks": [[FACE]],
    "suffix": ".jpg",
}
CLIP = ROW | {"of": "v", "rate": 24.0, "motion": 1.0, "same": 0.8, "keys": [], "looks": [[FACE]] * 5, "hash": "00" * 96}


def jpeg(level: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (20, 10), (level, level, level)).save(file, "JPEG")
    return file.getvalue()


def in_folder(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def in_tar(folder: Path, files: dict[str, bytes]) -> Path:
    """As webdataset's and img2dataset's writers do, with img2dataset's list beside it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with tarfile.open(folder / "00000.tar", "w") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    pq.write_table(pa.table({"key": ["1", "2"], "url": ["u", "v"]}), folder / "00000.parquet")
    return folder


def in_parquet(folder: Path, files: dict[str, bytes]) -> Path:
    """As img2dataset does with output_format parquet: a row that failed has no picture."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [row | {"jpg": files[f"{row['key']}.jpg"]} for row in said_in(files)]
    rows[0]["reference.png"] = files["1.reference.png"]
    pq.write_table(pa.Table.from_pylist(rows), folder / "00000.parquet")
    return folder


def said_in(files: dict[str, bytes]) -> list[dict]:
    """Rows with all columns."""
    return [{"license": None, "url": None, "key": key} | json.loads(files[f"{key}.json"]) for key in "12"]


def in_hugging_face_parquet(folder: Path, files: dict[str, bytes]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [row | {"image": {"bytes": files[f"{row['key']}.jpg"], "path": None}} for row in said_in(files)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
    return folder


def by_path_in_parquet(folder: Path, files: dict[str, bytes]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (folder / "own").mkdir()
    in_folder(folder / "own", {name: files[name] for name in files if name.endswith("jpg")})
    rows = [row | {"path": f"own/{row['key']}.jpg"} for row in said_in(files)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "list.parquet")
    return folder / "list.parquet"


@pytest.mark.parametrize("layout", [in_folder, in_tar, in_parquet, in_hugging_face_parquet, by_path_in_parquet])
def test_every_layout_says_the_same(tmp_path: Path, layout) -> None:
    said = {"1": {"caption": "A man.", "license": "MIT"}, "2": {"caption": "A woman.", "url": "https://example.org/2"}}
    files = {"1.jpg": jpeg(1), "1.json": b"", "1.reference.png": b"another", "2.jpg": jpeg(2), "2.json": b""}
    files |= {f"{key}.json": json.dumps(value).encode() for key, value in said.items()}
    items = [item for shard in shards_of(layout(tmp_path, files), PICTURES) for item in shard.items()]
    assert [(item.suffix, item.read()) for item in items] == [(".jpg", jpeg(1)), (".jpg", jpeg(2))]
    assert [item.said("caption") for item in items] == ["A man.", "A woman."]
    assert (items[0].said("licence"), items[1].said("source")) == ("MIT", "https://example.org/2")
    if layout in (in_folder, in_tar, in_parquet):
        assert read(items[0].reference, "1") == b"another" and items[0].reference_suffix == ".png"


def test_a_shard_is_known_by_its_files_and_settings(tmp_path: Path) -> None:
    """One more file changes one shard of many; another file, caption or setting is another shard."""
    in_folder(tmp_path, {f"{number}.jpg": jpeg(number % 256) for number in range(600)})
    (tmp_path / "source.json").write_text('{"source": "mine", "licence": "MIT"}')
    before = {shard.key({}) for shard in shards_of(tmp_path, PICTURES)}
    assert all(shard.licence == "MIT" for shard in shards_of(tmp_path, PICTURES)) and len(before) > 1
    assert {shard.key({}) for shard in shards_of(tmp_path, PICTURES)} == before
    assert not {shard.key({"frames": 9}) for shard in shards_of(tmp_path, PICTURES)} & before
    (tmp_path / "300x.jpg").write_bytes(jpeg(3))
    after = {shard.key({}) for shard in shards_of(tmp_path, PICTURES)}
    assert len(after - before) == 1
    (tmp_path / "300x.txt").write_text("A man.")
    assert len({shard.key({}) for shard in shards_of(tmp_path, PICTURES)} - after) == 1


def test_what_leads_out_of_the_folder_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "secret.jpg").write_bytes(jpeg(1))
    files = {f"{key}.{kind}": jpeg(1) if kind == "jpg" else b"{}" for key in "12" for kind in ("jpg", "json")}
    by_path_in_parquet(tmp_path / "in", files)
    (tmp_path / "in" / "own" / "1.jpg").unlink()
    (tmp_path / "in" / "own" / "1.jpg").symlink_to(tmp_path / "secret.jpg")
    items = list(shards_of(tmp_path / "in" / "list.parquet", PICTURES)[0].items())
    with pytest.raises(SampleError, match="missing"):
        items[0].read()
    assert items[1].read() == jpeg(1)


def test_nothing_to_look_at_is_told(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"holds nothing to look at: no \.png"):
        shards_of(tmp_path, PICTURES)
    with pytest.raises(SampleError, match="missing, empty"):
        Item(name="1").read()


def test_what_is_damaged_ends_its_shard_with_an_item_that_says_so(tmp_path: Path) -> None:
    in_tar(tmp_path, {"1.jpg": jpeg(1), "1.json": b"{", "2.jpg": bytes(3000)})
    (tmp_path / "00000.tar").write_bytes((tmp_path / "00000.tar").read_bytes()[:4000])
    items = list(shards_of(tmp_path, PICTURES)[0].items())
    assert [item.name for item in items] == ["1", "00000.tar"]
    for item, said in zip(items, ("it is no JSON", "is damaged")):
        with pytest.raises(SampleError, match=said):
            item.read()


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({}, None),
        ({"error": ["unreadable", "cut"]}, "unreadable"),
        ({"size": [800, 719]}, "lines"),
        ({"looks": [[]]}, "face"),
        ({"looks": [[FACE, FACE]]}, "faces"),
        ({"looks": [[FACE, FACE | {"size": 20.0}]]}, None),
        ({"looks": [[FACE, FACE | {"score": 0.55}]]}, None),
        ({"looks": [[FACE | {"size": 60.0}]]}, "face size"),
        ({"looks": [[FACE | {"sharpness": 9.0}]]}, "sharpness"),
        ({"text": 0.6}, "text"),
        ({"looks": [[FACE | {"yaw": -70.0}]]}, "yaw"),
        ({"looks": [[FACE | {"roll": 50.0}]]}, "roll"),
        ({"labels": {"nsfw": 0.9, "fine": 0.1}}, "safety"),
        ({"caption": None}, "caption"),
        ({"caption": "A man and a text."}, "caption"),
        ({"caption": "A man in context."}, None),
        ({"caption": "A man-made lake."}, "caption"),
    ],
)
def test_the_rules_of_pictures(change: dict, rule: str | None) -> None:
    keep = Keeping(refused_labels=("nsfw",))
    found = judged(ROW | change, rules("pictures", Measuring()), keep)
    assert (found and found[0]) == rule


TURNED = FACE | {"yaw": -50.0}


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({}, None),
        ({"looks": [[FACE], [TURNED], [], [], [FACE]]}, None),
        ({"looks": [[FACE], [FACE], [TURNED], [], []]}, None),
        ({"looks": [[FACE], [FACE], [FACE], [], []]}, "lost"),
        ({"looks": [[], [FACE], [FACE], [FACE], [FACE]]}, "lost"),
        ({"looks": [[TURNED], [], [], [], []]}, "seen"),
        ({"same": 0.1}, "one person"),
        ({"motion": 0.01}, "motion"),
        ({"motion": 20.0}, "motion"),
        ({"rate": 5.0}, "rate"),
        ({"rate": 7.99}, None),
    ],
)
def test_the_rules_of_clips(change: dict, rule: str | None) -> None:
    found = judged(CLIP | change, rules("video", Measuring()), Keeping())
    assert (found and found[0]) == rule


def test_captions_are_marked_for_the_trainer() -> None:
    assert marked("An old man reads.") == "An old man img reads."
    assert marked("A wizard img reads.") == "A wizard img reads."
    assert portrait_caption("a Woman, smiling") == ("A squared ID photo of a woman img, with pure black on two sides.")
    assert mark_identity(portrait_caption(None)).noun == "person"


@pytest.mark.parametrize(("height", "width", "size"), [(90, 60, (135, 90)), (60, 120, (120, 80)), (60, 90, (90, 60))])
def test_portraits_get_black_borders(height: int, width: int, size: tuple[int, int]) -> None:
    picture = np.asarray(Image.open(io.BytesIO(bordered(np.full((height, width, 3), 200, np.uint8), 1.5))))
    assert picture.shape[1::-1] == size
    assert picture[size[1] // 2, size[0] // 2].min() > 190
    assert (picture[0, 0].max() < 10) == (size != (width, height))


@pytest.mark.parametrize("exact", [50_000, 10])
def test_duplicates_leave_the_largest(exact: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By comparing all, and in groups of like ones, which is how many are compared."""
    monkeypatch.setattr(neighbours, "EXACT", exact)
    generator = np.random.default_rng(0)
    hashes = generator.integers(0, 256, (40, 32), np.uint8)
    near = hashes[3].copy()
    near[:6] ^= 0b1001  # 12 bits
    rows = [ROW | {"name": f"{n}", "id": f"{n:02d}", "hash": bits.tobytes().hex()} for n, bits in enumerate(hashes)]
    rows.append(rows[5] | {"name": "copy"})
    rows.append(ROW | {"name": "near", "id": "x", "hash": near.tobytes().hex(), "size": [999, 999]})
    found = neighbours.duplicates(rows, Keeping())
    assert {rows[at]["name"]: why[0] for at, why in found.items()} == {"copy": "duplicate", "3": "near duplicate"}
    assert not neighbours.duplicates(rows[:40], Keeping())
    one_video = [CLIP | {"name": "v", "id": f"v-{n}"} for n in range(3)]
    assert not neighbours.duplicates(one_video, Keeping())


def direction(*parts: float) -> np.ndarray:
    vector = np.zeros(512, np.float32)
    vector[: len(parts)] = parts
    return vector / np.linalg.norm(vector)


def test_an_identity_that_repeats_goes_with_all_its_pairs() -> None:
    """Two pairs of one reference are one identity; a like reference under another name repeats it."""
    faces = {"a": direction(1), "b": direction(1, 0.5), "c": direction(0, 1)}
    rows = [ROW | {"reference": name, "identity": packed(faces[name])} for name in "aabcb"]
    assert sorted(neighbours.repeated_identities(rows, Keeping())) == [2, 4]


def test_references_come_from_other_clips_of_the_person() -> None:
    """The one that is nearly the same is none, nor is a stranger; those farthest apart in yaw are taken."""

    def clip(name: str, *keys: tuple[float, np.ndarray]) -> dict:
        marked_keys = [{"frame": 4 * n, "yaw": yaw, "embedding": packed(face)} for n, (yaw, face) in enumerate(keys)]
        return CLIP | {"id": name, "of": name, "keys": marked_keys}

    person = [direction(1, 0.4 * n) for n in (-1, 0, 1)]
    rows = [
        clip("a", (0.0, person[1])),
        clip("b", (3.0, person[0]), (30.0, person[2]), (5.0, person[0]), (-20.0, person[0])),
        clip("same", (0.0, direction(1, 0.01))),
        clip("stranger", (0.0, direction(0, 0, 1))),
    ]
    keep = Keeping(references=2)
    found, people = neighbours.cross_references(rows, keep)
    assert found[0] == [(1, 0), (1, 4)] and people == [0, 0, 0, 3] and found[3] == []
    config = replace(CurationConfig(), keep=keep)
    lines = {line["id"]: line for line in samples("video", rows, rows, config)}
    assert lines["a"]["references"] == ["media/b/b.mp4@0", "media/b/b.mp4@4"] and lines["same"]["person"] == "a"
    assert lines["stranger"]["references"] == ["media/st/stranger.mp4@0"]


def test_spread_takes_the_farthest() -> None:
    assert spread([-40.0, 1.0, 2.0, 50.0, 49.0], 3) == [1, 3, 0]
    assert spread([], 3) == [] and spread([5.0, 5.0], 2) == [0]


def test_clips_stay_within_scenes_at_the_nearest_frames() -> None:
    """30 frames a second become 8: no clip crosses the cut, no frame is farther than half of one from its time."""
    footage = Footage(times=np.arange(100) / 30, cuts=[0, 45])
    clips = list(footage.clips(9, 8.0))
    assert [(clip[0], clip[-1]) for clip in clips] == [(0, 30), (45, 75)]
    wanted = np.arange(9) / 8
    assert abs(footage.times[clips[1]] - footage.times[45] - wanted).max() <= 0.5 / 30 + 1e-9
    assert list(Footage(times=np.arange(8) / 8, cuts=[0]).clips(9, 8.0)) == []
    assert len(list(Footage(times=np.arange(17) / 8, cuts=[0]).clips(9, 8.0))) == 1


def test_what_is_nearest_to_a_threshold_is_shown() -> None:
    """On both sides, of however many items, in a page that does not grow with them."""
    config = CurationConfig()
    tally = Tally("video", config)
    pages = []
    for _ in range(2):
        for number in range(1000):
            row = CLIP | {"name": f"{number}.mp4", "motion": number / 50}
            tally.measure(row)
            why = judged(row, rules("video", config.measure), config.keep)
            tally.keep(0, row) if why is None else tally.drop(0, row, why)
        pages.append(render_page(tally, [SimpleNamespace(items=list)]))
    nearest = {key: [round(50 * row["motion"]) for _, (_, row, _) in shown] for key, shown in tally.shown.items()}
    assert nearest["dropped", "min_motion"] == [2, 2, 1, 1, 0, 0]
    assert nearest["kept", "min_motion"] == [3, 3, 4, 4, 5, 5]
    assert nearest["kept", "max_motion"] == [750, 750, 749, 749, 748, 748]
    assert nearest["dropped", "max_motion"] == [751, 751, 752, 752, 753, 753]
    assert nearest["kept", ""] == [3, 4, 5, 6, 7, 8]  # the first
    assert "--set keep.min_motion=0.05" in pages[1] and "504 of 2,000 outside, 504 dropped by it" in pages[1]
    assert len(pages[1]) < len(pages[0]) + 500


def test_a_model_says_how_its_clips_are_cut() -> None:
    """The published names are the presets'; without one, the settings are those of the 5B model."""
    of = {name: load_settings(CurationConfig, None, settings_of_model(name)) for name in ("tiny", *PRESETS)}
    assert of["CogVideoX-5b"] == of["CogVideoX-2b"] == CurationConfig()
    assert (of["tiny"].measure.frames, of["tiny"].width, of["tiny"].keep.min_lines) == (9, 64, 96)
    of_1_5 = of["CogVideoX1.5-5B"]
    assert (of_1_5.measure.frames, of_1_5.measure.fps, of_1_5.height, of_1_5.keep.min_lines) == (81, 16, 768, 768)
    with pytest.raises(SettingError, match="must be tiny or one of CogVideoX-5b"):
        settings_of_model("CogVideoX-7b")


def test_sets_are_joined_where_they_lie(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One manifest, of the same files, that is made anew when a set changes; a set is never overwritten by it."""
    line = {"id": "7", "media": "media/7.png", "caption": "A man img reads.", "references": ["media/7.png"]}
    for name in ("pairs", "pictures"):
        (tmp_path / name / "media").mkdir(parents=True)
        Image.new("RGB", (64, 48)).save(tmp_path / name / "media" / "7.png")
        write_lines(tmp_path / name / MANIFEST, [line | {"person": "7", "licence": "MIT"}])
        if name == "pairs":
            assert main(["join", str(tmp_path)]) == 2
            assert "holds 1 training sets, of two or more" in capsys.readouterr().err
    for _ in range(2):
        assert main(["join", str(tmp_path)]) == 0
    assert capsys.readouterr().out.endswith("pairs: 1 samples\npictures: 1 samples\n")
    report = check_dataset(tmp_path, width=64, height=48, frames=1, fps=8, check_caption=mark_identity)
    assert report.usable == ["pairs/7", "pictures/7"] and not report.problems
    assert {(sample.person, sample.licence) for sample in read_manifest(tmp_path)} == {("7", "MIT")}
    write_lines(tmp_path / MANIFEST, [line])
    assert main(["join", str(tmp_path)]) == 2
    assert [sample.id for sample in read_manifest(tmp_path)] == ["7"]


def test_settings_are_named_when_they_are_wrong(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("keep:\n  min_lines: 512\n")
    assert load_settings(CurationConfig, path, {"keep.turned": "40.0"}).keep.min_lines == 512
    for name, value, said in (
        ("keep.lines", "3", "unknown keep.lines.*min_lines"),
        ("measure.frames", "10", r"10; it must be 8N \+ 1"),
        ("keep.min_seen", "2.0", "keep.min_seen is '2.0'"),
    ):
        with pytest.raises(SettingError, match=said):
            load_settings(CurationConfig, path, {name: value})
