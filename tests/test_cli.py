"""`python -m mm_core`, run as a user runs it."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import av
import pytest
import torch
from lora_files import write_loras
from processes import run_two
from safetensors.torch import load_file

from mm_core.__main__ import main
from mm_core.pipelines.base import TinyBase
from mm_core.pipelines.clip import Clip
from mm_core.pipelines.magic_mirror import MagicMirror
from mm_core.pipelines.tiny import TRANSFORMER

STEPS = ("--steps", "2", "--frames", "9", "--face-pack", "buffalo_sc")


@pytest.fixture
def arguments(photographs: Path, insightface_root: Path, tmp_path: Path) -> list[str]:
    return [
        "generate",
        *("--reference", str(photographs / "person_b_2.jpg")),
        *("--prompt", "A woman img smiles"),
        *("--output", str(tmp_path / "clip.mp4")),
        *("--insightface-root", str(insightface_root)),
        *STEPS,
    ]


@pytest.fixture(autouse=True)
def encoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home without a cache of prompts."""
    monkeypatch.setattr("mm_core.__main__.ENCODED", tmp_path / "encoded")
    monkeypatch.setenv("HOME", str(tmp_path))


def test_photos_and_a_prompt_become_a_video(arguments: list[str], photographs: Path, repository: Path) -> None:
    """Two photos of one person; the last line is the video's path; what the weights are is said first."""
    arguments.insert(3, str(photographs / "person_b_1.jpg"))
    run = subprocess.run(
        [sys.executable, "-m", "mm_core", *arguments], cwd=repository, capture_output=True, text=True, check=True
    )
    lines = run.stdout.splitlines()
    assert "tiny: trained: video stage" in lines[0]
    assert "similarity to the other photos" in run.stdout
    assert "2/2" in run.stderr
    with av.open(lines[-1]) as video:
        stream = video.streams.video[0]
        assert (stream.width, stream.height, stream.average_rate) == (64, 64, 8)
        assert sum(1 for _ in video.decode(stream)) == 9


def test_a_lora_changes_the_clip(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a strength behind its name, or without; 0 is the clip without one."""
    lora = write_loras(tmp_path / "loras", TRANSFORMER)["kohya"]
    clips = []
    for extra in ([], [f"{lora}:0"], [str(lora)], [f"{lora}:0.5"]):
        assert main([*arguments, "--output", str(tmp_path / "clip.gif"), *(["--lora", *extra] if extra else [])]) == 0
        clips.append((tmp_path / "clip.gif").read_bytes())
    assert clips[0] == clips[1]
    assert len(set(clips)) == 3
    assert "weights.safetensors: 57 layers, strength 0.5" in capsys.readouterr().out


def test_two_processes_share_the_clips(arguments: list[str], tmp_path: Path) -> None:
    """Two prompts: each process makes one, the clip of a run of its own, in a file that is named by its place."""
    prompts = ["A woman img smiles", "A woman img turns her head"]
    printed = run_two("-m", "mm_core", *arguments, "--output", str(tmp_path / "clip.gif"), "--prompt", *prompts)
    made = [tmp_path / f"clip_{number:05}_.gif" for number in (1, 2)]
    assert sorted(line for line in printed.splitlines() if line.endswith(".gif")) == [str(path) for path in made]
    assert printed.count("tiny: trained") == 2
    for prompt, path in zip(prompts, made, strict=True):
        assert main([*arguments, "--output", str(tmp_path / "alone.gif"), "--prompt", prompt]) == 0
        assert path.read_bytes() == (tmp_path / "alone.gif").read_bytes()
    assert made[0].read_bytes() != made[1].read_bytes()


@pytest.mark.parametrize(
    ("name", "start"), [("clip.webm", b"\x1aE\xdf\xa3"), ("clip.webp", b"RIFF"), ("clip.gif", b"GIF8")]
)
def test_the_ending_chooses_the_format(arguments: list[str], tmp_path: Path, name: str, start: bytes) -> None:
    """By the first bytes of the file."""
    assert main([*arguments, "--output", str(tmp_path / name)]) == 0
    assert (tmp_path / name).read_bytes().startswith(start)


def test_a_clip_that_cannot_be_written_is_kept(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last step fails, since a folder came in the way meanwhile; what was sampled is beside it."""
    decode = MagicMirror.decode

    def meanwhile(model: MagicMirror, latents: torch.Tensor) -> Clip:
        (tmp_path / "clip.mp4").mkdir()
        return decode(model, latents)

    monkeypatch.setattr(MagicMirror, "decode", meanwhile)
    assert main(arguments) == 2
    assert "The sampled clip is kept" in capsys.readouterr().err
    assert load_file(tmp_path / "clip.latents.safetensors")["latents"].shape == (1, 16, 3, 16, 16)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--frames", "-7"], "The clip has -7 frames; this model makes 1 (an image) to 9."),
        (["--frames", "8"], "The clip has 8 frames; this model makes 8 x N + 1 of them. Try 1 or 9."),
        (["--width", "481"], "The width is 481 px; it must be a multiple of 8. Try 480."),
        (["--prompt", "A lighthouse at night"], "The prompt names no person."),
        (["--prompt", "stone " * 226 + "man img"], "ends at token"),
        (["--can-scale", "nan"], "can_scale is nan; it must be a number from 0 to 3."),
        (["--start", "0.9", "--end", "0.1"], "start (0.9) is after end (0.1)"),
        (["--base", "nowhere"], "There is no base model nowhere"),
        (["--base", "THUDM/CogVideoX-5b"], "add --download"),
        (["--base", "CogVideoX1.5-5B"], "huggingface.co/THUDM/CogVideoX1.5-5B"),
        (["--adapter", "nothing.safetensors"], "There is no file nothing.safetensors."),
        (["--reference", "nothing.jpg"], "nothing.jpg"),
        (["--reference", *["nothing.jpg"] * 65], "65 reference photos were given; use at most 64"),
        (["--weights", "1", "0.5"], "2 weights for 1 photos; give one number a photo"),
        (["--weights", "-1"], "the weight of photo 1 is -1; it must be a number from 0 to 100"),
        (["--weights", "0"], "all weights are 0, which leaves no photo"),
        (["--lora", "nothing.safetensors:0.5"], "There is no file nothing.safetensors."),
        (["--lora", "nothing.safetensors:99"], "The LoRA's strength is 99.0; it must be from -20 to 20."),
        (["--face", "7"], "face 7 does not exist"),
        (["--face-pack", "nothing"], "unzip it there, or add --download"),
        (["--output", "clip.avi"], "must be one of mp4, webm, webp, gif"),
        (["--output", "nowhere/clip.mp4"], "does not exist; make it first"),
        (["--output", "folder.mp4"], "is a folder; give a file in it"),
        (["--seed", str(2**64)], "seed is 18446744073709551616; it must be from"),
        (["--context-parallel"], "context_parallel is on, and this is one process."),
        (["--attention", "sage"], "install `sageattention"),
        (["--vae", "vae.safetensors"], "but the base is tiny: only one that is a single file takes it"),
        (["--base", "x" * 5000], "xxx... cannot be used: File name too long. Give another path"),
    ],
)
def test_a_mistake_is_one_clear_line(
    arguments: list[str],
    extra: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Told before any model loads: there is no model to load, loading would fail the test."""
    monkeypatch.setattr(TinyBase, "load", lambda self, dtype: pytest.fail("the base model was loaded"))
    monkeypatch.setattr("mm_core.pipelines.named.DOWNLOADS", tmp_path / "nothing")
    monkeypatch.chdir(tmp_path)
    Path("folder.mp4").mkdir()
    monkeypatch.setattr(
        "mm_core.pipelines.identity.load_id_encoder", lambda *_, **__: pytest.fail("the ID encoder was loaded")
    )
    assert main([*arguments, *extra]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert "Traceback" not in error


def test_the_doctor_looks_into_comfyui(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "magic_mirror").mkdir()
    (tmp_path / "magic_mirror" / "mine.safetensors").write_bytes(b"nothing")
    assert main(["doctor", "--models", str(tmp_path), "--check-hashes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "PROBLEM: adapter mine.safetensors, 7 bytes" in lines
    assert any(hashlib.sha256(b"nothing").hexdigest() in line for line in lines)
    assert f"    belongs into {tmp_path / 'photomaker' / 'photomaker-v2.bin'}" in lines


def test_the_doctor_converts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "photomaker").mkdir()
    torch.save({"id_encoder": {"x": torch.ones(2)}}, tmp_path / "photomaker" / "photomaker-v2.bin")
    assert main(["doctor", "--models", str(tmp_path)]) == 0
    assert "CONVERTED" not in capsys.readouterr().out
    assert main(["doctor", "--models", str(tmp_path), "--convert"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("CONVERTED: ") and any(line.startswith("FOUND: ID encoder") for line in lines)
    assert load_file(tmp_path / "photomaker" / "photomaker-v2.safetensors")["id_encoder.x"].tolist() == [1, 1]


def test_the_doctor_looks_where_generate_does(
    insightface_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mm_core.__main__.DOWNLOADS", tmp_path)
    assert main(["doctor", "--insightface-root", str(insightface_root)]) == 0
    output = capsys.readouterr().out
    assert "FOUND: face pack buffalo_sc" in output and "adapter *" not in output
    assert f"belongs into {tmp_path / 'CogVideoX-5b'}" in output


def test_the_doctor_needs_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--models", str(tmp_path / "nowhere")]) == 2
    assert "nowhere; give ComfyUI's models folder" in capsys.readouterr().err


def test_without_a_package_it_says_what_to_install(arguments: list[str], repository: Path) -> None:
    code = "import sys, runpy; sys.modules['diffusers'] = None; runpy.run_module('mm_core', run_name='__main__')"
    run = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=repository, capture_output=True, text=True, check=False
    )
    assert run.returncode == 2 and "Traceback" not in run.stderr
    assert "diffusers" in run.stderr and "requirements.txt" in run.stderr
