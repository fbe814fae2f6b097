"""Frames into a file that shows on the node."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from typing import Any

from comfy_api.latest import InputImpl, Types, io, ui
from torch import Tensor

from ..mm_core.choices import VIDEO_FORMATS
from ..mm_core.errors import SettingError
from ..mm_core.playback import MAX_REPEATS, WITH_SOUND, Audio, Playback, check_format, check_frames
from ..mm_core.playback import frame_rate as as_fraction
from . import runtime
from .convert import sound_from_audio
from .types import CATEGORY, advanced, with_aliases

MAX_SKIPPED = 100_000
_NOT_CONNECTED = object()


class MagicMirrorVideoCombine(io.ComfyNode):
    """Writes frames, and sound, into the output folder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        schema = io.Schema(
            node_id="MagicMirrorVideoCombine",
            display_name="Video Combine (MagicMirror)",
            category=CATEGORY,
            description="Saves frames as a video. mp4, webm and webp files restore this workflow when they are dropped "
            "onto the page.",
            is_output_node=True,
            inputs=_inputs(),
            outputs=[
                io.Video.Output(display_name="video", tooltip="The frames that were not skipped, played forward once."),
                io.String.Output(display_name="path", tooltip="Where the file is."),
            ],
        )
        return with_aliases(schema, "save video", "video combine", "mp4", "gif", "animated webp")

    @classmethod
    def validate_inputs(
        cls,
        filename_prefix: str | None = None,
        frame_rate: float | None = None,
        format: str | None = None,
        audio: object = _NOT_CONNECTED,
    ) -> bool | str:
        """Refuse what makes no file before anything runs; connected inputs are not known yet, and None. A rate that is
        no number, ComfyUI has told."""
        has_sound = audio is not _NOT_CONNECTED and format is not None
        rate = frame_rate if isinstance(frame_rate, (int, float)) else 1.0
        name = VIDEO_FORMATS[0] if format is None else str(format)
        try:
            check_format(rate, name, quality=0, has_sound=has_sound)
        except SettingError as error:
            return runtime.translated(error)
        return runtime.prefix_problem(filename_prefix, f".{format}") or True

    @classmethod
    def execute(
        cls,
        images: Tensor,
        frame_rate: float,
        filename_prefix: str,
        format: str,
        quality: int,
        audio: dict[str, Any] | None = None,
        save_metadata: bool = True,
        pingpong: bool = False,
        loop_count: int = 0,
        skip_first_frames: int = 0,
        skip_last_frames: int = 0,
        trim_to_audio: bool = False,
        save_output: bool = True,
    ) -> io.NodeOutput:
        from ..mm_core.video import write_picture, write_video

        check_format(frame_rate, format, quality=quality, has_sound=audio is not None)
        frames = images[..., :3]
        check_frames(tuple(frames.shape), format)
        sound = None if audio is None else sound_from_audio(audio)
        height, width = frames.shape[1:3]
        temporary = not save_output
        file = runtime.output_file(
            filename_prefix, f".{format}", cls.hidden, width=width, height=height, temporary=temporary
        )
        metadata = runtime.workflow_metadata(cls.hidden) if save_metadata else None
        path = write_video(
            file,
            frames,
            frame_rate,
            format=format,
            quality=quality,
            audio=sound,
            metadata=metadata,
            playback=Playback(
                skip_first=skip_first_frames,
                skip_last=skip_last_frames,
                pingpong=pingpong,
                repeats=loop_count,
                trim_to_sound=trim_to_audio,
            ),
            progress=runtime.frames_callback(),
        )
        if format == "gif" and metadata:  # the page restores a workflow from many kinds of files, not from this
            beside = dataclasses.replace(file, suffix=".png", first=file.number, number=None)
            write_picture(beside, frames[skip_first_frames], metadata)
        rate = as_fraction(frame_rate)
        kept = images[skip_first_frames : len(frames) - skip_last_frames]
        components = Types.VideoComponents(images=kept, audio=_after(sound, skip_first_frames / rate), frame_rate=rate)
        return io.NodeOutput(
            InputImpl.VideoFromComponents(components),
            str(path),
            ui=ui.SavedImages(
                [runtime.saved_result(file, temporary=temporary)],
                is_animated=format in WITH_SOUND or len(kept) > 1,
            ),
        )


def _after(sound: Audio | None, seconds: Fraction) -> dict[str, Any] | None:
    """What is left of a sound, as AUDIO."""
    if sound is None:
        return None
    samples, rate = sound
    return {"waveform": samples[None, :, round(seconds * rate) :], "sample_rate": rate}


def _inputs() -> list[io.Input]:
    return [
        io.Image.Input("images", tooltip="The frames."),
        io.Float.Input(
            "frame_rate",
            default=8.0,
            min=0.1,
            max=240.0,
            step=0.01,
            tooltip="Frames per second. CogVideoX 1.0 was trained at 8, 1.5 at 16.",
        ),
        io.String.Input(
            "filename_prefix",
            default="magic_mirror",
            tooltip="Start of the file's name in the output folder; may name a folder (videos/name), "
            "%date:yyyy-MM-dd%, and a widget (%Node.widget%). A number follows; no file is replaced.",
        ),
        io.Combo.Input(
            "format",
            options=list(VIDEO_FORMATS),
            default=VIDEO_FORMATS[0],
            tooltip="mp4 (H.264) plays everywhere. webp and gif hold no sound, gif no workflow.",
        ),
        io.Int.Input(
            "quality", default=80, min=0, max=100, tooltip="0: smallest file. 100: best picture. Not for gif."
        ),
        io.Audio.Input("audio", optional=True, tooltip="Sound, cut to the clip's length; for mp4 and webm."),
        io.Boolean.Input("save_metadata", default=True, optional=True, tooltip="Write this workflow into the file."),
        *map(advanced, _playback_inputs()),
    ]


def _playback_inputs() -> list[io.Input]:
    skipped = {"default": 0, "min": 0, "max": MAX_SKIPPED, "optional": True}
    return [
        io.Boolean.Input("pingpong", default=False, optional=True, tooltip="Play backwards after forwards."),
        io.Int.Input(
            "loop_count",
            default=0,
            min=0,
            max=MAX_REPEATS,
            optional=True,
            tooltip="How many more times the clip plays. 0: for ever in webp and gif, once in mp4 and webm.",
        ),
        io.Int.Input(
            "skip_first_frames", **skipped, tooltip="Frames left out at the beginning, together with their sound."
        ),
        io.Int.Input("skip_last_frames", **skipped, tooltip="Frames left out at the end."),
        io.Boolean.Input(
            "trim_to_audio", default=False, optional=True, tooltip="End with the sound, where that is shorter."
        ),
        io.Boolean.Input(
            "save_output",
            default=True,
            optional=True,
            tooltip="Off: into the temporary folder, which ComfyUI clears when it starts.",
        ),
    ]
