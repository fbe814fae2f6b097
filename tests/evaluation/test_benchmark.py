"""The benchmark: its set, the runner, killed and resumed, the systems at tiny sizes, tables and exports."""

from __future__ import annotations

import csv
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLMagvit,
    CogVideoXImageToVideoPipeline,
    CogVideoXTransformer3DModel,
    ConsisIDPipeline,
    ConsisIDTransformer3DModel,
    DiffusionPipeline,
    EasyAnimateInpaintPipeline,
    EasyAnimateTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
)
from tiny_models import TRANSFORMERS, build_pipeline
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from mm_core.errors import CheckpointError, MagicMirrorError, SettingError
from mm_core.evaluation import systems
from mm_core.evaluation.__main__ import main
from mm_core.evaluation.benchmark_set import CLASSES, Entry, build_set, read_set
from mm_core.evaluation.generate import clip_of, generate
from mm_core.evaluation.systems import LOADERS, Request, Size, Weights
from mm_core.faces.analysis import FaceAnalyzer

with socket.create_server(("127.0.0.1", 0)) as _server:
    PORT = _server.getsockname()[1]
CPU = torch.device("cpu")
EXAMPLES = Path(__file__).parents[2] / "mm_core" / "examples"
BASELINES = ("cogvideox", "cogvideox-i2v", "consisid", "easyanimate")


@pytest.fixture(scope="module")
def benchmark_set(tmp_path_factory: pytest.TempPathFactory, analyzer: FaceAnalyzer) -> Path:
    folder = tmp_path_factory.mktemp("set")
    for name, person in {"man_1": "elderly_man/karl", "man_2": "elderly_man/karl", "woman_1": "woman/lena"}.items():
        (folder / "people" / person).mkdir(parents=True, exist_ok=True)
        shutil.copy(EXAMPLES / f"{name}.jpg", folder / "people" / person)
    build_set(analyzer, folder / "people", folder / "set", 2)
    return folder / "set"


def test_a_set_is_a_folder_in_ipvgs_layout(benchmark_set: Path) -> None:
    entries = read_set(benchmark_set)
    assert [entry.name for entry in entries[:4]] == [f"karl_prompt{number}" for number in (1, 2, 3, 4)]
    people = {(entry.person, entry.kind, len(entry.photos), entry.prompt.split(" ")[0]) for entry in entries}
    assert people == {("karl", "elderly man", 2, "An"), ("lena", "woman", 1, "A")}
    assert len({entry.prompt for entry in entries}) == 8
    groups = json.loads((Path(systems.__file__).with_name("prompts.json")).read_text(encoding="utf-8"))
    assert groups.keys() == set(CLASSES.values()) and all(len(set(own)) == len(own) >= 4 for own in groups.values())
    with pytest.raises(MagicMirrorError, match="is there already"):
        build_set(None, benchmark_set, benchmark_set)
    with pytest.raises(MagicMirrorError, match="holds no benchmark"):
        read_set(benchmark_set / "karl")


def test_all_that_is_wrong_with_people_is_told_at_once(
    tmp_path: Path, analyzer: FaceAnalyzer, photographs: Path
) -> None:
    people = {
        "man/two": ["person_a_1", "person_b_1"], "woman/many": ["impostor_1"] * 5, "robots/r2": ["impostor_1"],
        "boy/none": [],
    }  # fmt: skip
    for name, photos in people.items():
        (tmp_path / name).mkdir(parents=True)
        for number, photo in enumerate(photos):
            shutil.copy(photographs / f"{photo}.jpg", tmp_path / name / f"{number}.jpg")
    with pytest.raises(MagicMirrorError) as raised:
        build_set(analyzer, tmp_path, tmp_path / "out")
    told = str(raised.value)
    for fault in (
        "4 people are there, 50 are wanted", "nobody is in elderly man, elderly woman, girl, baby",
        "robots is no class", "many holds 5 photos", "none holds 0 photos", "1.jpg shows another person than 0.jpg",
    ):  # fmt: skip
        assert fault in told
    assert not (tmp_path / "out").exists()


def test_killed_and_resumed_to_a_table_and_exports(
    benchmark_set: Path, insightface_root: Path, tmp_path: Path, repository: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out, own = tmp_path / "out", tmp_path / "set"  # of one prompt a person
    shutil.copytree(benchmark_set, own, ignore=shutil.ignore_patterns("prompt[234].txt"))
    (own / "lena" / "woman_1.jpg").unlink()
    os.mkfifo(own / "lena" / "woman_1.jpg")  # whoever reads it waits
    common = ["benchmark", f"--set={own}", f"--out={out}", "--face-pack=buffalo_sc"]
    common += [f"--insightface-root={insightface_root}"]
    ours = [*common, "--system=magic-mirror", "--model=tiny", "--steps=1", "--frames=1", "--seed=5"]
    videos = out / "magic-mirror" / "videos"
    processes = [start_process(rank, ours, repository) for rank in (0, 1)]  # the second one's share is that picture
    while all(process.poll() is None for process in processes) and not list(videos.glob("*.mp4")):
        time.sleep(0.05)
    for process in processes:
        process.kill()
        process.wait()
    before = {path.name: path.stat().st_mtime_ns for path in videos.glob("*.mp4")}
    assert list(before) == ["karl_prompt1.mp4"]
    (own / "lena" / "woman_1.jpg").unlink()
    shutil.copy(benchmark_set / "lena" / "woman_1.jpg", own / "lena")

    monkeypatch.setattr("mm_core.evaluation.recognisers.other_judges", lambda: [])
    assert main(ours) == 0
    assert len(list(videos.glob("*.mp4"))) == 2
    assert before == {name: (videos / name).stat().st_mtime_ns for name in before}  # kept
    assert main([*ours[:-1], "--seed=6"]) == 2
    assert "made with seed 5, not 6" in capsys.readouterr().err
    prompt = (own / "karl" / "prompt1.txt").read_text()
    (own / "karl" / "prompt1.txt").write_text("A man waits.")
    assert main(ours) == 2
    assert "karl_prompt1.mp4 is not of the photos and the prompt that karl has now" in capsys.readouterr().err
    (own / "karl" / "prompt1.txt").write_text(prompt)
    for wrong, told in (
        (["--system=nobody"], "karl_prompt1.mp4"), (["--system=../out"], "a folder's name"),
        ([*ours[-4:-1], "--system=cogvideox", "--clip=/nowhere"], "no CLIP model"),  # before anything is made
    ):  # fmt: skip
        assert main([*common, *wrong]) == 2 and told in capsys.readouterr().err

    shutil.copytree(videos, out / "somebody's" / "videos")
    shutil.copy(out / "magic-mirror" / "results.json", out / "somebody's")  # newer than the clips: not measured again
    assert main([*common, "--system=somebody's"]) == 0
    check_tables(out)
    check_exports(own, out / "magic-mirror", tmp_path)


def start_process(rank: int, command: list[str], repository: Path) -> subprocess.Popen:
    """One of two processes, as accelerate starts them."""
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(PORT)}
    env = os.environ | meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    return subprocess.Popen([sys.executable, "-m", "mm_core.evaluation", *command], cwd=repository, env=env)


def check_tables(out: Path) -> None:
    with (out / "table.csv").open(encoding="utf-8", newline="") as file:
        rows = {(row["system"], row["measure"]): row for row in csv.DictReader(file)}
    assert float(rows["magic-mirror", "seconds"]["value"]) > 0 and rows["magic-mirror", "device"]["value"] == "cpu"
    assert rows["magic-mirror", "facesim_arc"]["value"] == rows["somebody's", "facesim_arc"]["value"] != ""
    assert ("somebody's", "seconds") not in rows  # nobody counted it
    assert rows["Magic Mirror, reported by the paper", "id_similarity"]["value"] == "0.922"
    markdown = (out / "table.md").read_text(encoding="utf-8")
    assert all(title in markdown for title in ("## Quality", "## Likeness", "## Cost"))
    for table in markdown.split("## ")[1:]:
        assert len({line.count("|") for line in table.splitlines() if line.startswith("|")}) == 1
        assert "| magic-mirror |" in table


def check_exports(benchmark_set: Path, clips: Path, tmp_path: Path) -> None:
    to = ["export", f"--set={benchmark_set}", f"--clips={clips}"]
    assert main([*to, "--to=vbench", f"--out={tmp_path / 'vbench'}"]) == 0
    names = sorted(path.name for path in (tmp_path / "vbench").iterdir())
    assert names == sorted(f"{entry.prompt}-0.mp4" for entry in read_set(benchmark_set))
    assert main([*to, "--to=opens2v", f"--out={tmp_path / 'opens2v'}"]) == 0
    index = json.loads((tmp_path / "opens2v" / "Human-Domain_Eval.json").read_text(encoding="utf-8"))
    assert sorted(path.stem for path in (tmp_path / "opens2v" / "Videos").iterdir()) == sorted(index)
    for entry in index.values():
        assert (tmp_path / "opens2v" / entry["img_paths"][0]).is_file()
    assert [entry["class_label"] for entry in index.values()] == [["Man"], ["Woman"]]
    (clips / "videos" / "karl_prompt1.mp4").unlink()
    assert main([*to, "--to=vbench", f"--out={tmp_path / 'half'}"]) == 2
    assert not (tmp_path / "half").exists()


def tiny(system: str) -> DiffusionPipeline:
    """A random pipeline of a baseline's class."""
    pipe = build_pipeline("5b")
    text = dict(tokenizer=pipe.tokenizer, text_encoder=pipe.text_encoder)
    sizes = TRANSFORMERS["5b"] | dict(in_channels=8, max_text_seq_length=226)
    shared = dict(vae=pipe.vae, scheduler=pipe.scheduler, **text)
    if system == "cogvideox":
        return pipe
    if system == "cogvideox-i2v":
        return CogVideoXImageToVideoPipeline(transformer=CogVideoXTransformer3DModel(**sizes), **shared)
    if system == "consisid":
        faces = dict(
            is_train_face=True, cross_attn_interval=1, cross_attn_dim_head=4, cross_attn_num_heads=2, LFE_id_dim=2,
            LFE_vit_dim=2, LFE_depth=5, LFE_dim_head=8, LFE_num_heads=2, LFE_num_id_token=1, LFE_num_querie=1,
            LFE_output_dim=21, LFE_ff_mult=1, LFE_num_scale=1,
        )  # fmt: skip
        return ConsisIDPipeline(transformer=ConsisIDTransformer3DModel(**sizes, **faces), **shared)
    pipe.tokenizer.chat_template = "{% for message in messages %}{{ message.content[0].text }}{% endfor %}"
    words = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    words |= dict(num_key_value_heads=2, vocab_size=len(pipe.tokenizer))
    words["rope_scaling"] = {"type": "mrope", "mrope_section": [1, 1, 2]}
    sight = dict(depth=1, embed_dim=16, hidden_size=16, num_heads=2)
    down, up = ("SpatialTemporalDownBlock3D",) * 3, ("SpatialTemporalUpBlock3D",) * 3
    vae = AutoencoderKLMagvit(
        block_out_channels=(8,) * 4, latent_channels=4, layers_per_block=1, norm_num_groups=2, spatial_group_norm=False,
        down_block_types=("SpatialDownBlock3D", *down), up_block_types=("SpatialUpBlock3D", *up),
    )  # fmt: skip
    transformer = EasyAnimateTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=9, out_channels=4, time_embed_dim=2, patch_size=2,
        text_embed_dim=16, num_layers=1, sample_width=16, sample_height=16,
    )  # fmt: skip
    encoder = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=words, vision_config=sight))
    return EasyAnimateInpaintPipeline(
        vae=vae, text_encoder=encoder, tokenizer=pipe.tokenizer, transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip


def faces_of_consisid(folder: str, device: torch.device, dtype: torch.dtype) -> Callable:
    """In place of face models of a gigabyte: of the photo, its mean."""

    def describe(photo: np.ndarray) -> dict:
        mean = float(photo.mean()) / 255
        hidden = [torch.full((1, 2, 2), mean)]
        return {"image": systems.Image.fromarray(photo), "id_cond": torch.full((1, 2), mean), "id_vit_hidden": hidden}

    return describe


@pytest.mark.parametrize("system", BASELINES)
def test_baselines_are_wired(
    system: str, tmp_path: Path, analyzer: FaceAnalyzer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(systems, "consisid_faces", faces_of_consisid)
    torch.manual_seed(0)
    tiny(system).save_pretrained(tmp_path / "model")
    make = LOADERS[system](Weights(model=str(tmp_path / "model")), analyzer, CPU)
    size = Size(width=48, height=32, frames=9, steps=2)
    photos = [(EXAMPLES / f"{name}_1.jpg",) for name in ("man", "woman")]
    clips = [make(Request(prompt="A man walks.", photos=photo, seed=1, size=size))[0] for photo in photos]
    assert clips[0].shape == (9, 32, 48, 3) and np.isfinite(clips[0]).all()
    assert (np.abs(clips[0] - clips[1]).max() > 1e-4) == (system != "cogvideox")  # which sees no photo
    if system == "cogvideox":  # nobody else knows our trigger
        marked = make(Request(prompt="A man img walks.", photos=photos[0], seed=1, size=size))[0]
        assert np.array_equal(marked, clips[0])
    other = make(Request(prompt="A man walks.", photos=photos[0], seed=2, size=size))[0]
    assert np.abs(clips[0] - other).max() > 1e-4
    entry = Entry(name="a", person="a", kind="man", photos=photos[0], prompt="A man walks.")
    generate([entry], lambda: make, tmp_path, size=size, seed=1, device=CPU)
    assert json.loads((tmp_path / "costs" / "a.json").read_text())["frames"] == 9 and clip_of(tmp_path, entry).is_file()


def test_what_a_baseline_lacks_is_told(
    analyzer: FaceAnalyzer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mm_core.pipelines.named.DOWNLOADS", tmp_path / "models")
    with pytest.raises(CheckpointError, match="models/CogVideoX-5b holds no CogVideoXPipeline"):
        LOADERS["cogvideox"](Weights(model="CogVideoX-5b"), analyzer, CPU)
    with pytest.raises(CheckpointError, match=r"holds no CogVideoXImageToVideoPipeline: it has no model_index"):
        LOADERS["cogvideox-i2v"](Weights(model=str(tmp_path)), analyzer, CPU)
    (tmp_path / "text_encoder").mkdir()
    kernel = {"text_config": {"_attn_implementation": "somebody/attention"}}
    (tmp_path / "text_encoder" / "config.json").write_text(json.dumps(kernel))
    for index in ({"_class_name": "A"}, {"_class_name": ["a", "A"]}, {"_class_name": "A", "vae": ["own", "Vae"]}):
        (tmp_path / "model_index.json").write_text(json.dumps(index))
        with pytest.raises(CheckpointError, match="names code that would be run"):
            LOADERS["easyanimate"](Weights(model=str(tmp_path)), analyzer, CPU)
        (tmp_path / "text_encoder" / "config.json").unlink(missing_ok=True)
    with pytest.raises(MagicMirrorError, match="pip install consisid_eva_clip facexlib"):
        systems.consisid_faces(str(tmp_path), CPU, torch.float32)
    with pytest.raises(SettingError, match="number is 0"):
        build_set(analyzer, EXAMPLES, tmp_path / "out", 0)
