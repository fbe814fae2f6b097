"""Features of a small data set of rendered people, by the real face models and the tiny preset."""

from __future__ import annotations

import errno
import json
import shutil
import signal
import time
from collections import namedtuple
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import small_shards
import torch
from PIL import Image
from processes import imported
from safetensors.torch import load_file

from lab.people.manifest import write_manifest
from lab.people.shards import RenderSettings, render_dataset
from mm_core.data import features as features_module
from mm_core.data import precompute as module
from mm_core.data.features import INDEX, SETTINGS, Features
from mm_core.data.frozen import between
from mm_core.data.manifest import MANIFEST, read_media, read_picture
from mm_core.errors import CheckpointError, MagicMirrorError, SettingError
from mm_core.faces.analysis import FaceAnalyzer
from mm_core.faces.references import analyse_references
from mm_core.faces.tracking import find_faces
from mm_core.files import PARTIAL
from mm_core.pipelines.base import TinyBase
from mm_core.pipelines.clip import ClipSettings
from mm_core.pipelines.control import AdapterSettings
from mm_core.pipelines.magic_mirror import MagicMirror
from mm_core.release.prepare import check, feature_settings
from mm_core.training.config import StageConfig, TrainingConfig
from mm_core.training.loop_config import LoopConfig
from mm_core.training.sources import features_of
from mm_core.video import write_video

PACK = "buffalo_sc"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two people in two clips, the last once more in another size, and everything that can be wrong with a sample."""
    folder = tmp_path_factory.mktemp("data")
    render_dataset(folder, RenderSettings(first=0, stop=2, clips=2), processes=1)
    write_manifest(folder, MANIFEST, pictures=False)
    lines = [json.loads(line) for line in (folder / MANIFEST).read_text().splitlines()]
    last = lines[-1]
    clip = read_media(folder, last["media"])
    write_video(folder / "wide.mp4", np.pad(clip.repeat(2, 1).repeat(2, 2), ((0, 0), (0, 0), (40, 40), (0, 0))), 8)
    write_video(folder / "flat.mp4", np.full((9, 64, 64, 3), 90, np.uint8), 8)
    write_video(folder / "short.mp4", clip[:5], 8)
    write_video(folder / "small.mp4", clip[:, :48, :48], 8)
    turned, gone = clip.copy(), clip.copy()
    turned[2:7], gone[2:] = 90, 90  # of the frames 0, 4 and 8 that are looked at, one and two are without a face
    write_video(folder / "turned.mp4", turned[:, :, 2:-2], 8)  # narrower than the frame: the rest is black
    write_video(folder / "gone.mp4", gone, 8)
    Image.new("RGB", (64, 64), "grey").save(folder / "flat.png")
    (folder / "cut.png").write_bytes((folder / "flat.png").read_bytes()[:60])
    (folder / "cut.mp4").write_bytes(b"no video")
    references = ["flat.png", "cut.png", *last["references"]]
    lines += [
        last | {"id": "wide", "media": "wide.mp4", "references": references, "licence": "CC-BY-4.0", "source": "fair"},
        last | {"id": "faceless", "media": "flat.mp4"},
        last | {"id": "short", "media": "short.mp4"},
        last | {"id": "small", "media": "small.mp4"},
        last | {"id": "corrupt", "media": "cut.mp4"},
        last | {"id": "uncaptioned", "caption": ""},
        last | {"id": "nobody", "caption": "A house."},
        last | {"id": "no face", "references": ["flat.png"]},
        last | {"id": "turned", "media": "turned.mp4"},
        last | {"id": "gone", "media": "gone.mp4"},
    ]
    (folder / MANIFEST).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def config_of(data: Path, output: Path, insightface_root: Path) -> TrainingConfig:
    loop = LoopConfig(steps=1, batch_size=1)
    return TrainingConfig(
        base="tiny",
        output=str(output),
        width=64,
        height=64,
        image=StageConfig(data=str(data), features=str(output / "features"), frames=1, loop=loop),
        video=StageConfig(data=str(data), features=str(output / "features"), frames=9, loop=loop),
        insightface_root=str(insightface_root),
        face_pack=PACK,
    )


@pytest.fixture(scope="module", autouse=True)
def in_small_shards() -> None:
    """Shards of three, so that there are several; one thread, whose sums other processes make in the same order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SAMPLES_PER_SHARD", small_shards.SAMPLES)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def config(data: Path, tmp_path_factory: pytest.TempPathFactory, insightface_root: Path) -> TrainingConfig:
    return config_of(data, tmp_path_factory.mktemp("run"), insightface_root)


@pytest.fixture(scope="module")
def made(config: TrainingConfig) -> Path:
    """The folder of a run that nothing disturbed."""
    return precompute(config, "video")


@pytest.fixture(scope="module")
def features(made: Path) -> Features:
    return Features.open(made)


def precompute(config: TrainingConfig, stage: str) -> Path:
    folder = features_of(config, stage)
    assert module.precompute(feature_settings(config, stage), folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_cannot_be_used_is_left_out_and_counted(features: Features) -> None:
    assert [entry["id"] for entry in features.entries] == ["0-0", "0-1", "1-0", "1-1", "wide", "turned"]
    assert features.counts == {
        "samples": 6,
        "references": 4,
        "frames looked at": 21,
        "frames with a face": 20,
        "padded": 1,
        "skipped": {
            "references": {"no face in a reference": 1, "corrupt file": 1},
            "samples": {
                "no face in the clip": 1,
                "face seen too rarely": 1,
                "too few frames": 1,
                "too small": 1,
                "corrupt file": 1,
                "no caption": 1,
                "caption": 1,
                "no usable reference: no face in a reference": 1,
            },
        },
    }
    assert [entry["person"] for entry in features.entries] == ["0", "0", "1", "1", "1", "1"]
    assert features.licences == "CC-BY-4.0 (1), unknown (5)"


def test_the_check_finds_the_same_without_looking_for_faces(config: TrainingConfig) -> None:
    report = check(config, "video")
    assert report.usable == ["0-0", "0-1", "1-0", "1-1", "wide", "faceless", "no face", "turned", "gone"]
    assert json.loads((Path(config.output) / "check-video.json").read_text()) == report.to_json()


def test_values_are_those_of_the_pipeline(features: Features, data: Path, insightface_root: Path) -> None:
    mirror = MagicMirror(TinyBase(), precision="fp32", device=torch.device("cpu"))
    analyzer = FaceAnalyzer(insightface_root, PACK)
    lines = [json.loads(line) for line in (data / MANIFEST).read_text().splitlines()]
    for number in (1, 3):
        sample, line = features.sample(number), lines[number]
        clip = ClipSettings(prompt=line["caption"], width=64, height=64, num_frames=9)
        tokens = mirror.checks.of_prompt(clip, AdapterSettings())
        assert tuple(sample["slots"].tolist()) == tokens.slots
        torch.testing.assert_close(sample["prompt_embeds"].float(), mirror.encode_text(tokens.ids)[0], **HALF)

        paths = [features.references[reference] for reference in sample["references"]]
        assert paths == line["references"]
        identity = mirror.identity(analyse_references(analyzer, [read_picture(data, path) for path in paths]))
        found = features.reference(sample["references"][0])
        torch.testing.assert_close(found["id_tokens"].float(), identity.features.id_tokens[0], **HALF)
        torch.testing.assert_close(found["structure_tokens"].float(), identity.features.structure_tokens[0], **HALF)
        assert np.array_equal(found["embedding"], identity.references[0].face.embedding)
    torch.testing.assert_close(features.empty.float(), mirror.encode_text(""), **HALF)

    frames = read_media(data, lines[3]["media"])
    pixels = torch.from_numpy(frames).permute(3, 0, 1, 2)[None] / 127.5 - 1
    latents = sample["latents"].float().permute(1, 0, 2, 3)[None]  # (1, C, F', H', W')
    with torch.no_grad():
        encoded = mirror.pipeline.vae.encode(pixels).latent_dist.mean
        torch.testing.assert_close(latents, encoded * mirror.pipeline.vae.config.scaling_factor, **HALF)
        decoded = mirror.pipeline.vae.decode(encoded).sample[0].permute(1, 2, 3, 0)
        # The pipeline's own decode gives what the VAE makes of the clip.
        torch.testing.assert_close(mirror.decode(latents).frames, (decoded / 2 + 0.5).clamp(0, 1), rtol=0, atol=5e-3)


HALF = dict(rtol=2e-3, atol=2e-3)


def test_faces_are_linear_between_the_frames_looked_at(features: Features, data: Path, insightface_root: Path) -> None:
    analyzer = FaceAnalyzer(insightface_root, PACK)
    sample = features.sample(2)
    frames = read_media(data, "clips/1-0.mkv")
    faces = [find_faces(analyzer, frames[number])[0] for number in (0, 4, 8)]
    assert np.allclose(sample["boxes"][::4], [face.box for face in faces])
    assert np.allclose(sample["landmarks"][::4], [face.landmarks for face in faces])
    assert np.allclose(sample["boxes"][6], (faces[1].box + faces[2].box) / 2, atol=1e-3)
    wide, same = features.sample(4), features.sample(3)  # twice the size, and cut to its middle: the same picture
    assert (wide["boxes"] - same["boxes"]).abs().max() < 3
    assert between(np.array([[1.0]]), range(0, 1, 4), 1).tolist() == [[1.0]]


def test_a_gap_is_bridged(features: Features) -> None:
    """A frame without a face has what is between its neighbours', and says so."""
    turned, whole = features.sample(5), features.sample(3)
    assert turned["seen"].tolist() == [True, False, True] and whole["seen"].all()
    assert torch.equal(turned["boxes"][4], (turned["boxes"][0] + turned["boxes"][8]) / 2)
    assert (turned["boxes"][[0, 8]] - whole["boxes"][[0, 8]]).abs().max() < 3


def test_each_prompt_is_stored_once_and_whole(made: Path, data: Path) -> None:
    """T5 reads its padding, as CogVideoX has it: what it makes of that differs by prompt, and from place to place."""
    captions = [json.loads(line)["caption"] for line in (data / MANIFEST).read_text().splitlines()]
    shards = sorted(made.glob("prompts-*"))
    stored = [name for shard in shards for name in features_module.header_of(shard)["rows"]]
    assert stored == list(dict.fromkeys(["", *(caption for caption in captions if caption != "A house.")]))
    _, one, other = load_file(shards[0])["prompt_embeds"].float()
    assert not torch.equal(one[-1], other[-1]) and not torch.equal(one[-1], one[-2])


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_killed_processes_go_on_to_the_same_files(
    processes: int, config: TrainingConfig, made: Path, tmp_path: Path
) -> None:
    """SIGKILL to all as soon as a few shards are there, then the same again, the first one last. The folder is that of
    one process that nothing disturbed; what was made before the kill is not made again."""
    folder = tmp_path / "features"

    def start(rank: int) -> BaseProcess:
        arguments = feature_settings(config, "video"), folder, rank, processes
        process = imported().Process(target=small_shards.run, args=arguments)
        process.start()
        return process

    def ends(process: BaseProcess) -> int:
        process.join()
        return process.exitcode

    killed = [start(rank) for rank in range(processes)]
    while len(list(folder.glob("[!.]*.safetensors"))) < 3 and any(process.is_alive() for process in killed):
        time.sleep(0.01)
    for process in killed:
        process.kill()
    assert -signal.SIGKILL in [ends(process) for process in killed]
    (folder / f".samples-00000.safetensors.1{PARTIAL}").write_bytes(b"half")
    with pytest.raises(CheckpointError, match="not finished"):
        Features.open(folder)
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("[!.]*.safetensors")}
    others = [start(rank) for rank in range(1, processes)]
    assert not any(ends(process) for process in others) and not (folder / INDEX).is_file()
    assert ends(start(0)) == 0
    assert contents(folder) == contents(made)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_another_config_in_the_folder_is_refused(config: TrainingConfig, made: Path) -> None:
    with pytest.raises(SettingError, match="another width: 64, not 48"):
        precompute(replace(config, width=48), "video")
    with pytest.raises(SettingError, match="another frames: 9, not 1"):
        precompute(config, "image")
    settings = (made / SETTINGS).read_text()
    try:
        changed = json.loads(settings)
        (made / SETTINGS).write_text(json.dumps(changed | {"weights": "others"}))
        shard = (made / "samples-00000.safetensors").rename(made / "aside")
        with pytest.raises(SettingError, match="another weights"):
            precompute(config, "video")
        shard.rename(made / "samples-00000.safetensors")
    finally:
        (made / SETTINGS).write_text(settings)


def test_a_full_disk_is_told(
    data: Path, insightface_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(data, tmp_path, insightface_root)
    with monkeypatch.context() as patch:
        usage = namedtuple("usage", "total used free")(10**9, 10**9, 1000)
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        with pytest.raises(MagicMirrorError, match=r"samples need about"):
            precompute(config, "video")

    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(MagicMirrorError, match="The disk is full"):
        precompute(config, "video")
    assert not list(Path(config.video.features).glob("*.safetensors"))


def test_not_one_usable_sample(data: Path, insightface_root: Path, tmp_path: Path) -> None:
    line = {"id": "a", "media": "flat.png", "caption": "A man.", "references": ["flat.png"]}
    (data / "flat.jsonl").write_text(json.dumps(line))
    config = config_of(data / "flat.jsonl", tmp_path, insightface_root)
    with pytest.raises(MagicMirrorError, match=r"Not one of 1 samples .*no face in the clip"):
        precompute(config, "image")
    assert not (Path(config.image.features) / INDEX).exists()


def test_mapped_shards_give_the_same(features: Features, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features_module, "IN_MEMORY", 0)
    monkeypatch.setattr(features_module, "_OPEN_SHARDS", 1)
    mapped = Features.open(made)
    assert len(mapped) == len(features)
    for number in range(len(features)):
        kept, read = features.sample(number), mapped.sample(number)
        assert kept.pop("references") == read.pop("references") and kept.keys() == read.keys()
        assert all(torch.equal(kept[name], read[name]) for name in kept)
    assert torch.equal(mapped.reference(3)["embedding"], features.reference(3)["embedding"])


def test_damaged_features_are_refused(made: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="do not exist yet"):
        Features.open(tmp_path)
    folder = Path(shutil.copytree(made, tmp_path / "copy"))
    shard = folder / "samples-00001.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match=r"samples-00001.safetensors \(1 of 9 files\)"):
        Features.open(folder)
    shard.write_bytes(b"\xff" * len(whole))
    with pytest.raises(CheckpointError, match="damaged"):
        Features.open(folder).sample(3)
    index = json.loads((folder / INDEX).read_text())
    for wrong in ("{", "[" * 10**5, json.dumps(index | {"samples": [{"shard": "../x", "row": 0}]}), '{"shards": 1}'):
        (folder / INDEX).write_text(wrong)
        with pytest.raises(CheckpointError, match="damaged"):
            Features.open(folder)
