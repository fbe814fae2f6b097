"""Small files that would unpack, or repeat themselves, to more than any machine has."""

from __future__ import annotations

import io
import json
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lab.people.npz import read_frames_array
from mm_core.checkpoints.photomaker import convert_id_encoder, load_id_encoder
from mm_core.data.manifest import Source, parse_manifest, read_media
from mm_core.errors import CheckpointError, MagicMirrorError, SampleError, SettingError
from mm_core.faces.analysis import Face
from mm_core.faces.crop import whole_image
from mm_core.faces.tracking import find_faces
from mm_core.picture_file import read_image
from mm_core.training.config import load_config
from mm_core.video import write_video


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    begun = time.process_time()
    yield
    assert time.process_time() - begun < 10


def test_yaml_has_no_aliases(tmp_path: Path) -> None:
    """465 bytes were 36 seconds and 4.4 GB once."""
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in zip("abcdefgh", "bcdefghi")]
    (tmp_path / "bomb.yaml").write_text("\n".join(lines))
    with pytest.raises(SettingError, match=r"bomb\.yaml cannot be read: it uses an alias"):
        load_config(tmp_path / "bomb.yaml")


@pytest.mark.parametrize("text", ["[" * 50_000, "a: " * 3 + "&x *x", "\x00", "- " * 20_000])
def test_yaml_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(SettingError, match=r"bad\.yaml"):
        load_config(tmp_path / "bad.yaml")


@pytest.mark.parametrize("value", ["[" * 50_000, "&a [*a]", ".inf"])
def test_a_setting_of_the_command_line(value: str) -> None:
    config = Path(__file__).parents[1] / "mm_core" / "training" / "configs" / "cogvideox_5b.yaml"
    with pytest.raises(SettingError, match=r"learning_rate"):
        load_config(config, {"video.loop.learning_rate": value})


@pytest.mark.parametrize("value", ["[0]", "[5, 4]", "[0, 1001]", "7"])
def test_a_pair_that_is_none(value: str) -> None:
    """Found by the campaign: --only yaml --seed 0 --first 220."""
    config = Path(__file__).parents[1] / "mm_core" / "training" / "configs" / "cogvideox_5b.yaml"
    with pytest.raises(SettingError, match=r"cogvideox_5b\.yaml: .*identity_timesteps"):
        load_config(config, {"video.identity_timesteps": value})


@pytest.mark.parametrize("clips", [10**4, 10**12])
def test_a_shard_is_measured_before_it_is_unpacked(tmp_path: Path, clips: int) -> None:
    header = io.BytesIO()
    shape = {"descr": "|u1", "fortran_order": False, "shape": (clips, 9, 512, 512, 3)}
    np.lib.format.write_array_header_1_0(header, shape)
    with zipfile.ZipFile(tmp_path / "people.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("frames.npy", header.getvalue() + bytes(2**20))
    with pytest.raises(SampleError, match=r"unpacks to [\d,]+ bytes; at most 2,147,483,648"):
        read_frames_array(tmp_path / "people.npz")


def test_a_shard_is_never_unpickled(tmp_path: Path) -> None:
    np.savez(tmp_path / "people.npz", frames=np.array([{"a": 1}], dtype=object))
    with pytest.raises(SampleError, match=r"cannot read|holds"):
        read_frames_array(tmp_path / "people.npz")


def test_a_picture_of_too_many_pixels(tmp_path: Path) -> None:
    Image.new("1", (12_000, 10_000)).save(tmp_path / "large.png")
    with pytest.raises(MagicMirrorError, match=r"12000 x 10000 px, more than the 100 megapixels"):
        read_image(tmp_path / "large.png")


def test_only_pictures_of_the_list_are_opened(tmp_path: Path) -> None:
    """An EPS that is called .png would start Ghostscript."""
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.eps")
    (tmp_path / "photo.eps").rename(tmp_path / "photo.png")
    with pytest.raises(MagicMirrorError, match=r"Cannot read the photo .*: it is no picture of a kind that is read"):
        read_image(tmp_path / "photo.png")


def test_a_view_that_repeats_one_number_is_no_id_encoder(tmp_path: Path) -> None:
    bomb = torch.zeros(1).expand(2**40)
    torch.save({"id_encoder": {"x": bomb}, "lora_weights": {"y": bomb}}, tmp_path / "photomaker-v2.bin")
    for read in (load_id_encoder, convert_id_encoder):
        with pytest.raises(CheckpointError, match=r"names tensors of 8,796,093,022,208"):
            read(tmp_path / "photomaker-v2.bin")


def test_torchs_advice_to_unpickle_does_not_reach_the_user(tmp_path: Path) -> None:
    torch.save({"id_encoder": print}, tmp_path / "photomaker-v2.bin")
    with pytest.raises(CheckpointError, match="could run code") as error:
        load_id_encoder(tmp_path / "photomaker-v2.bin")
    assert "weights_only" not in str(error.value)


@pytest.mark.parametrize("path", ["a\0.png", "\ud800.png", "x.png#" + "1" * 5000, "#1" * 5000, "../x.png", "C:x.png"])
def test_a_manifests_paths(path: str) -> None:
    with pytest.raises(SettingError):
        Source.parse(path)


def test_a_manifests_lines(tmp_path: Path) -> None:
    line = {"id": "1", "media": "a.png", "caption": "x", "references": ["a.png"]}
    many = json.dumps(line | {"references": ["a.png"] * 99})
    lines = ["[" * 100_000, json.dumps(line | {"caption": "x" * 2**21}), many]
    (tmp_path / "manifest.jsonl").write_text("\n".join([*lines, json.dumps(line)]))
    found = [sample for _, sample in parse_manifest(tmp_path / "manifest.jsonl")]
    assert [str(error) for error in found[:1]] == [str(found[0])] and "nested too deeply" in str(found[0])
    assert "more than 1,048,576 bytes" in str(found[1])
    assert any("names 99 pictures; it may name 64" in str(error) for error in found)
    assert not isinstance(found[-1], SettingError)


def test_a_manifest_does_not_lead_out_by_a_link(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(SampleError, match="is a link out of"):
        read_media(tmp_path / "data", "a.png")
    (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)  # the folder itself may be one
    assert read_media(tmp_path / "link", "secret.png").shape == (1, 8, 8, 3)


def test_a_playlist_is_no_video(tmp_path: Path) -> None:
    """FFmpeg would read the files that it names."""
    write_video(tmp_path / "clip.mp4", np.zeros((9, 64, 64, 3), np.uint8), 8)
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile clip.mp4\n")
    assert read_media(tmp_path, "clip.mp4").shape == (9, 64, 64, 3)
    with pytest.raises(SampleError, match=r"cannot read the video .*list\.mp4"):
        read_media(tmp_path, "list.mp4")


def test_one_line_of_pixels_is_not_enlarged_without_end() -> None:
    """To look for faces, and for the image encoder: 0.6 MB were 39 GB, and 30 GB."""

    class Analyzer:
        seen: list[tuple[int, ...]] = []

        def detect(self, frame: np.ndarray, recognise: bool) -> list[Face]:
            self.seen.append(frame.shape)
            return []

    line = np.zeros((1, 200_000, 3), np.uint8)
    assert find_faces(Analyzer(), line) == [] and Analyzer.seen == [line.shape]
    assert whole_image(line).shape == (224, 224, 3)
