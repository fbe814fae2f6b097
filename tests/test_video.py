"""Every format, written and read again."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from mm_core.choices import VIDEO_FORMATS
from mm_core.errors import MagicMirrorError, SettingError
from mm_core.video import write_video

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
        ({"format": "avi"}, SettingError, "'avi'"),
        ({"quality": 101}, SettingError, "101"),
        ({"format": "gif", "audio": tone(1)}, SettingError, "no sound"),
        ({"audio": tone(1, channels=3)}, SettingError, "3 channels"),
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
