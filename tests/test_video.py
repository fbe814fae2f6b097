"""Every format, written and read again."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from mm_core.choices import VIDEO_FORMATS
from mm_core.errors import MagicMirrorError, SettingError
from mm_core.playback import Playback
from mm_core.video import write_video

ROOT = Path(__file__).resolve().parents[1]
STREAMS = ("mp4", "webm")
GRAPH = {"prompt": json.dumps({"1": {"class_type": "Grüße"}}), "workflow": json.dumps({"nodes": [1, 2]})}
RATE = 16000


@pytest.fixture
def frames() -> torch.Tensor:
    """(9, 48, 64, 3) in 0..1: a colour gradient that moves, so that each frame differs."""
    x = torch.linspace(0, 1, 64).expand(9, 48, 64)
    time = torch.linspace(0, 1, 9)[:, None, None]
    return torch.stack([x, (x + time) % 1, time.expand_as(x)], dim=-1)


def tone(seconds: float, channels: int = 1, rate: int = RATE) -> tuple[torch.Tensor, int]:
    wave = torch.sin(torch.arange(round(seconds * rate)) * (2 * torch.pi * 440 / rate)) * 0.5
    return wave.expand(channels, -1), rate


def read(path: Path) -> np.ndarray:
    """(F, H, W, 3) uint8."""
    if path.suffix[1:] in STREAMS:
        with av.open(str(path)) as container:
            return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    with Image.open(path) as image:
        return np.stack([read_frame(image, index) for index in range(image.n_frames)])


def read_frame(image: Image.Image, index: int) -> np.ndarray:
    image.seek(index)
    return np.array(image.convert("RGB"))


def read_sound(path: Path) -> tuple[np.ndarray, int]:
    with av.open(str(path)) as container:
        blocks = [frame.to_ndarray() for frame in container.decode(audio=0)]
        return np.concatenate(blocks, axis=1), container.streams.audio[0].rate


@pytest.mark.parametrize("format", VIDEO_FORMATS)
def test_frames_come_back(frames: torch.Tensor, tmp_path: Path, format: str) -> None:
    path = write_video(tmp_path / f"clip.{format}", frames, 8, format=format, quality=95)
    back = read(path)
    assert back.shape == (9, 48, 64, 3)
    assert np.abs(back / 255 - frames.numpy()).mean() < 0.06  # chroma is stored at half size; gif has 256 colours
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("format", VIDEO_FORMATS)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float16])
def test_arrays_of_any_type(frames: torch.Tensor, tmp_path: Path, format: str, dtype: type) -> None:
    array = (frames.numpy() * 255).round() if dtype is np.uint8 else frames.numpy()
    same = write_video(tmp_path / f"a.{format}", array.astype(dtype), 8, format=format)
    assert np.abs(read(same) / 255 - frames.numpy()).mean() < 0.08


@pytest.mark.parametrize("format", VIDEO_FORMATS)
def test_one_frame(frames: torch.Tensor, tmp_path: Path, format: str) -> None:
    assert read(write_video(tmp_path / f"one.{format}", frames[:1], 8, format=format)).shape == (1, 48, 64, 3)


@pytest.mark.parametrize("format", VIDEO_FORMATS)
def test_odd_sizes(frames: torch.Tensor, tmp_path: Path, format: str) -> None:
    """Streams store colour for 2 x 2 pixels: they gain a line, pictures do not."""
    back = read(write_video(tmp_path / f"odd.{format}", frames[:, :47, :63], 8, format=format))
    assert back.shape == ((9, 48, 64, 3) if format in STREAMS else (9, 47, 63, 3))


@pytest.mark.parametrize("format", STREAMS)
@pytest.mark.parametrize("fps", [8, 24000 / 1001, 12.5, Fraction(16)])
def test_stream_rates(frames: torch.Tensor, tmp_path: Path, format: str, fps: float) -> None:
    with av.open(str(write_video(tmp_path / f"rate.{format}", frames, fps, format=format))) as container:
        assert float(container.streams.video[0].average_rate) == pytest.approx(float(fps), rel=1e-3)


@pytest.mark.parametrize("format", ["webp", "gif"])
@pytest.mark.parametrize("fps", [8, 24])
def test_picture_durations_do_not_drift(frames: torch.Tensor, tmp_path: Path, format: str, fps: int) -> None:
    with Image.open(write_video(tmp_path / f"rate.{format}", frames, fps, format=format)) as image:
        total = 0
        for index in range(image.n_frames):
            image.seek(index)
            image.load()
            total += image.info["duration"]
    assert total == pytest.approx(9000 / fps, abs=5)


@pytest.mark.parametrize("format", STREAMS)
def test_streams_carry_the_graph(frames: torch.Tensor, tmp_path: Path, format: str) -> None:
    with av.open(str(write_video(tmp_path / f"graph.{format}", frames, 8, format=format, metadata=GRAPH))) as container:
        found = {key.lower(): value for key, value in container.metadata.items()}
    assert {key: found[key] for key in GRAPH} == GRAPH


def test_webp_carries_the_graph(frames: torch.Tensor, tmp_path: Path) -> None:
    """In the tags where ComfyUI's own Save Animated WEBP puts it, which is where its page looks."""
    with Image.open(write_video(tmp_path / "graph.webp", frames, 8, format="webp", metadata=GRAPH)) as image:
        exif = image.getexif()
    assert exif[0x0110] == f"prompt:{GRAPH['prompt']}"
    assert exif[0x010F] == f"workflow:{GRAPH['workflow']}"


@pytest.mark.parametrize("format", STREAMS)
@pytest.mark.parametrize(("channels", "rate"), [(1, RATE), (2, 44100), (2, 12345), (6, 48000)])
def test_sound(frames: torch.Tensor, tmp_path: Path, format: str, channels: int, rate: int) -> None:
    path = write_video(tmp_path / f"a.{format}", frames, 8, format=format, audio=tone(9 / 8, channels, rate))
    sound, stored_rate = read_sound(path)
    assert sound.shape[0] == channels
    assert sound.shape[1] / stored_rate == pytest.approx(9 / 8, abs=0.1)
    spectrum = np.abs(np.fft.rfft(sound[0]))
    assert np.fft.rfftfreq(len(sound[0]), 1 / stored_rate)[spectrum.argmax()] == pytest.approx(440, abs=5)


@pytest.mark.parametrize("format", STREAMS)
@pytest.mark.parametrize(("seconds", "kept"), [(5.0, 9 / 8), (0.5, 0.5)])
def test_sound_ends_with_the_clip(
    frames: torch.Tensor, tmp_path: Path, format: str, seconds: float, kept: float
) -> None:
    path = write_video(tmp_path / f"a.{format}", frames, 8, format=format, audio=tone(seconds))
    sound, rate = read_sound(path)
    assert sound.shape[1] / rate == pytest.approx(kept, abs=0.1)
    assert len(read(path)) == 9


def test_quality_decides_the_size(tmp_path: Path) -> None:
    noise = torch.rand(9, 48, 64, 3, generator=torch.Generator().manual_seed(0))
    for format in (*STREAMS, "webp"):
        sizes = [
            write_video(tmp_path / f"{quality}.{format}", noise, 8, format=format, quality=quality).stat().st_size
            for quality in (0, 50, 100)
        ]
        assert sizes == sorted(sizes) and sizes[0] * 1.5 < sizes[2]


@pytest.mark.parametrize(
    ("changed", "error", "says"),
    [
        ({"frames": torch.zeros(0, 8, 8, 3)}, MagicMirrorError, "no clip to write"),
        ({"frames": torch.zeros(2, 8, 8)}, MagicMirrorError, "no clip to write"),
        ({"frames": torch.zeros(2, 8, 8, 4)}, MagicMirrorError, "(2, 8, 8, 4)"),
        ({"fps": 0}, SettingError, "frame rate is 0"),
        ({"fps": float("nan")}, SettingError, "frame rate is nan"),
        ({"fps": 1e-4}, SettingError, "from 0.01 to 1000"),
        ({"frames": torch.zeros(2, 8, 8, 1)}, MagicMirrorError, "1 channels"),
        ({"frames": torch.zeros(2, 8, 8, 2)}, MagicMirrorError, "Convert a mask to an image"),
        ({"frames": torch.zeros(2, 0, 8, 3)}, MagicMirrorError, "no clip to write"),
        ({"frames": torch.zeros(1, 2, 17000, 3)}, MagicMirrorError, "17000 x 2 px; a mp4 file holds up to 16384 px"),
        ({"frames": torch.zeros(1, 16384, 2, 3), "format": "webp"}, MagicMirrorError, "16383 px a side"),
        ({"frames": torch.zeros(1, 2, 65536, 3), "format": "gif"}, MagicMirrorError, "65535 px a side"),
        ({"frames": torch.full((2, 8, 8, 3), float("nan"))}, MagicMirrorError, "no numbers"),
        ({"format": "avi"}, SettingError, "'avi'"),
        ({"quality": 101}, SettingError, "101"),
        ({"format": "gif", "audio": tone(1)}, SettingError, "no sound"),
        ({"audio": tone(1, channels=3)}, SettingError, "3 channels"),
        ({"audio": (torch.zeros(0, 100), RATE)}, SettingError, "0 channels"),
        ({"audio": (torch.zeros(100), RATE)}, SettingError, "channels"),
        ({"audio": (torch.zeros(1, 1, 100), RATE)}, SettingError, "shape (1, 1, 100)"),
        ({"audio": (torch.zeros(1, 100), 0)}, SettingError, "0 samples a second"),
        ({"audio": (torch.zeros(1, 100), float("nan"))}, SettingError, "nan samples a second"),
        ({"audio": (torch.zeros(1, 100), 44100.5)}, SettingError, "a whole number"),
        ({"audio": (torch.full((1, 100), float("nan")), RATE)}, SettingError, "no numbers"),
        ({"playback": Playback(skip_first=5, skip_last=4)}, SettingError, "No frame is left of 9: 5 are left out"),
        ({"playback": Playback(skip_first=-1)}, SettingError, "must be 0 or more"),
        ({"playback": Playback(repeats=101)}, SettingError, "from 0 to 100"),
    ],
)
def test_what_cannot_be_written(
    frames: torch.Tensor, tmp_path: Path, changed: dict, error: type[MagicMirrorError], says: str
) -> None:
    arguments = {"frames": frames, "fps": 8} | changed
    with pytest.raises(error) as raised:
        write_video(tmp_path / "never.mp4", **arguments)
    assert says in str(raised.value)
    assert not list(tmp_path.iterdir())


def shown(path: Path) -> list[int]:
    """Which of the frames of `numbered` a file shows, in its order."""
    return [round(frame[..., 0].mean() / 20) for frame in read(path).astype(float)]


@pytest.fixture
def numbered() -> torch.Tensor:
    """(6, 16, 16, 3): each frame one grey, told apart after any encoding."""
    return (torch.arange(6) * 20 / 255).view(6, 1, 1, 1).expand(6, 16, 16, 3)


@pytest.mark.parametrize("format", VIDEO_FORMATS)
@pytest.mark.parametrize(
    ("playback", "wanted"),
    [
        (Playback(pingpong=True), [0, 1, 2, 3, 4, 5, 4, 3, 2, 1]),
        (Playback(skip_first=2), [2, 3, 4, 5]),
        (Playback(skip_last=2), [0, 1, 2, 3]),
        (Playback(skip_first=1, skip_last=2, pingpong=True), [1, 2, 3, 2]),
        (Playback(skip_first=5, pingpong=True), [5]),
    ],
)
def test_which_frames_are_played(
    numbered: torch.Tensor, tmp_path: Path, format: str, playback: Playback, wanted: list[int]
) -> None:
    path = write_video(tmp_path / f"a.{format}", numbered, 8, format=format, playback=playback)
    assert shown(path) == wanted


@pytest.mark.parametrize("format", STREAMS)
def test_a_stream_holds_its_repeats(numbered: torch.Tensor, tmp_path: Path, format: str) -> None:
    path = write_video(tmp_path / f"a.{format}", numbered, 8, format=format, playback=Playback(repeats=2))
    assert shown(path) == [0, 1, 2, 3, 4, 5] * 3


@pytest.mark.parametrize("format", ["webp", "gif"])
@pytest.mark.parametrize(("repeats", "plays"), [(0, 0), (1, 2), (3, 4)])
def test_an_animated_picture_says_how_often_it_plays(
    numbered: torch.Tensor, tmp_path: Path, format: str, repeats: int, plays: int
) -> None:
    """A webp's number is how often, a gif's how often again; 0 is for ever in both."""
    path = write_video(tmp_path / f"a.{format}", numbered, 8, format=format, playback=Playback(repeats=repeats))
    with Image.open(path) as image:
        stored = image.info["loop"]
    assert stored == (plays if format == "webp" or not plays else plays - 1)


@pytest.mark.parametrize("format", STREAMS)
@pytest.mark.parametrize(("seconds", "trim", "wanted"), [(0.5, True, 4), (0.5, False, 6), (9.0, True, 6)])
def test_a_clip_may_end_with_its_sound(
    numbered: torch.Tensor, tmp_path: Path, format: str, seconds: float, trim: bool, wanted: int
) -> None:
    playback = Playback(trim_to_sound=trim)
    path = write_video(tmp_path / f"a.{format}", numbered, 8, format=format, audio=tone(seconds), playback=playback)
    assert len(read(path)) == wanted


@pytest.mark.parametrize("format", STREAMS)
def test_skipped_frames_take_their_sound_with_them(numbered: torch.Tensor, tmp_path: Path, format: str) -> None:
    """Silence, then a tone from the third frame on."""
    samples, rate = tone(0.75)
    samples = samples.clone()
    samples[:, : rate // 4] = 0
    for skipped, loud in ((0, False), (2, True)):
        path = write_video(
            tmp_path / f"{skipped}.{format}",
            numbered,
            8,
            format=format,
            audio=(samples, rate),
            playback=Playback(skip_first=skipped),
        )
        sound, stored = read_sound(path)
        beginning = np.abs(sound[0, stored // 50 : stored // 8]).mean()
        assert (beginning > 0.1) == loud


@pytest.mark.parametrize("format", STREAMS)
def test_a_sound_of_nothing(numbered: torch.Tensor, tmp_path: Path, format: str) -> None:
    path = write_video(tmp_path / f"a.{format}", numbered, 8, format=format, audio=(torch.zeros(2, 0), RATE))
    with av.open(str(path)) as container:
        assert not container.streams.audio


# Patches whose red, green and blue differ, and that no encoder's rounding hides: green, red, blue, skin, yellow, cyan.
COLOURS = [(40, 160, 60), (200, 30, 30), (30, 30, 200), (224, 172, 140), (250, 240, 20), (10, 200, 220)]


@pytest.mark.parametrize("format", STREAMS)
@pytest.mark.parametrize(("height", "width"), [(64, 96), (768, 1344)])
def test_colours_are_tagged_and_come_back(tmp_path: Path, format: str, height: int, width: int) -> None:
    """Within three levels, at any size; what a browser shows is in tests/comfyui/test_colours.py."""
    clip = np.repeat(np.array(COLOURS, np.uint8), width // len(COLOURS), axis=0)[None, None].repeat(height, axis=1)
    path = write_video(tmp_path / f"a.{format}", clip.repeat(2, axis=0), 8, format=format)
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
    assert (frame.colorspace, frame.color_range) == (6, 1)  # BT.601, limited
    middles = [round((index + 0.5) * width / len(COLOURS)) for index in range(len(COLOURS))]
    assert np.abs(read(path)[0, height // 2, middles].astype(int) - COLOURS).max() <= 3


class Cancelled(Exception):
    pass


@pytest.mark.parametrize("format", VIDEO_FORMATS)
def test_progress_and_cancelling(frames: torch.Tensor, tmp_path: Path, format: str) -> None:
    """Each frame is told, the last one when the file is written; what is raised ends the work at that frame."""
    told: list[tuple[int, int]] = []
    write_video(tmp_path / f"a.{format}", frames, 8, format=format, progress=lambda *done: told.append(done))
    assert list(dict.fromkeys(told)) == [(done, 9) for done in range(9)] + ([(9, 9)] if format in STREAMS else [])

    def cancel(done: int, total: int) -> None:
        told.append((done, total))
        if done == 3:
            raise Cancelled

    told.clear()
    with pytest.raises(Cancelled):
        write_video(tmp_path / f"b.{format}", frames, 8, format=format, progress=cancel)
    assert told[-1] == (3, 9) and [path.name for path in tmp_path.iterdir()] == [f"a.{format}"]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is read from /proc")
@pytest.mark.parametrize("format", VIDEO_FORMATS)
def test_a_clip_is_written_a_frame_at_a_time(tmp_path: Path, format: str) -> None:
    """What it adds to the memory is some frames: below 0.3 of a clip of 97."""
    code = """
        import sys, torch
        from pathlib import Path
        from mm_core.video import write_video

        def peak():
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

        path, format = Path(sys.argv[1]), sys.argv[2]
        small = torch.rand(3, 24, 48)
        def frame(index):
            rolled = small.roll(index, 2)[None]
            return torch.nn.functional.interpolate(rolled, (480, 720), mode="bilinear")[0].permute(1, 2, 0)
        write_video(path, torch.stack([frame(0), frame(1)]), 8, format=format)
        clip = torch.empty(97, 480, 720, 3)
        for index in range(len(clip)):
            clip[index] = frame(index)
        Path("/proc/self/clear_refs").write_text("5")
        before = peak()
        write_video(path, clip, 8, format=format)
        print((peak() - before) / clip.nbytes)
    """
    head = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
    command = [sys.executable, "-c", head + textwrap.dedent(code), str(tmp_path / f"a.{format}"), format]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 0.3


@pytest.mark.parametrize("format", VIDEO_FORMATS)
def test_a_failure_leaves_nothing_behind(
    frames: torch.Tensor, tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a half-written file, nor one that replaced an older one."""
    path = write_video(tmp_path / f"clip.{format}", frames, 8, format=format)
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_video(path, frames[:3], 8, format=format)
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == before
