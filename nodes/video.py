"""Frames into a file that shows on the node."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from comfy_api.latest import InputImpl, Types, io, ui
from torch import Tensor

from ..mm_core.choices import VIDEO_FORMATS
from . import runtime
from .types import CATEGORY, with_aliases

_PLAYED = ("mp4", "webm")


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
            inputs=[
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
                    tooltip="Start of the file's name in the output folder; may name a folder (videos/name).",
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
                io.Boolean.Input(
                    "save_metadata", default=True, optional=True, tooltip="Write this workflow into the file."
                ),
            ],
            outputs=[
                io.Video.Output(display_name="video"),
                io.String.Output(display_name="path", tooltip="Where the file is."),
            ],
        )
        return with_aliases(schema, "save video", "video combine", "mp4", "gif", "animated webp")

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
    ) -> io.NodeOutput:
        from ..mm_core.video import write_picture, write_video

        path, result = runtime.output_file(filename_prefix, f".{format}", images.shape[2], images.shape[1])
        metadata = runtime.workflow_metadata(cls.hidden) if save_metadata else None
        write_video(
            path,
            images[..., :3],
            frame_rate,
            format=format,
            quality=quality,
            audio=None if audio is None else (audio["waveform"][0], audio["sample_rate"]),
            metadata=metadata,
        )
        if format == "gif" and metadata:  # the page restores a workflow from many kinds of files, not from this
            write_picture(path.with_suffix(".png"), images[0, ..., :3], metadata)
        rate = Fraction(frame_rate).limit_denominator(1001)
        return io.NodeOutput(
            InputImpl.VideoFromComponents(Types.VideoComponents(images=images, audio=audio, frame_rate=rate)),
            str(path),
            ui=ui.SavedImages([result], is_animated=format in _PLAYED or len(images) > 1),
        )
