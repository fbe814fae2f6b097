"""LoRA on either route: on the pack's own model, or on ComfyUI's MODEL."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from comfy_api.latest import io

from ..mm_core.errors import CheckpointError
from . import runtime
from .types import CATEGORY, Model, ModelSocket, with_aliases

if TYPE_CHECKING:
    from ..mm_core.checkpoints.lora_file import LoraFile
    from .native_model import ModelPatcher

_KIND = "loras"
_MAX_STRENGTH = 20.0
EitherModel = io.Custom("MAGICMIRROR_MODEL,MODEL")


class MagicMirrorLoRA(io.ComfyNode):
    """Model + LoRA -> a model of the same type."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        schema = io.Schema(
            node_id="MagicMirrorLoRA",
            display_name="LoRA (MagicMirror)",
            category=CATEGORY,
            description="Puts a LoRA for CogVideoX on a model, in whatever names its trainer wrote it. Several such "
            "nodes in a row add up.",
            inputs=[
                io.MultiType.Input(
                    "model",
                    types=[ModelSocket, io.Model],
                    tooltip="From Load MagicMirror or Apply CAN Adapter, or a MODEL of ComfyUI's own CogVideoX.",
                ),
                io.Combo.Input(
                    "lora_name",
                    options=runtime.model_files(_KIND, ".safetensors"),
                    tooltip="A .safetensors file in models/loras, trained on this very model (2B, 5B or 1.5).",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-_MAX_STRENGTH,
                    max=_MAX_STRENGTH,
                    step=0.05,
                    tooltip="1 as trained, 0 off, below 0 the opposite. -20 to 20.",
                ),
            ],
            outputs=[
                EitherModel.Output(display_name="model", tooltip="Of the type that came in."),
                io.String.Output(display_name="status", tooltip="How many layers the LoRA changes."),
            ],
        )
        return with_aliases(schema, "lora loader", "load lora", "cogvideox lora", "style")

    @classmethod
    def fingerprint_inputs(cls, lora_name: str | None = None, **_: object) -> tuple[int, int] | None:
        """A file that is replaced under the same name counts as another LoRA; None comes from another node."""
        if lora_name is None:
            return None
        stat = runtime.model_file(_KIND, lora_name).stat()
        return stat.st_mtime_ns, stat.st_size

    @classmethod
    def execute(cls, model: Model | ModelPatcher, lora_name: str, strength: float) -> io.NodeOutput:
        path = runtime.model_file(_KIND, lora_name)
        if isinstance(model, Model):
            lora, changed = _on_mirror(model, path, strength)
        else:
            lora, changed = _on_native(model, path, strength)
        status = f"{lora_name}: {len(lora.keys)} layers, strength {strength:g}"
        return io.NodeOutput(changed, status, ui=runtime.show(status))


def _on_mirror(model: Model, path: Path, strength: float) -> tuple[LoraFile, Model]:
    from ..mm_core.pipelines.lora import Lora

    lora = Lora.open(path, strength, model.mirror.base)
    return lora.file, dataclasses.replace(model, loras=(*model.loras, lora)) if strength else model


def _on_native(model: ModelPatcher, path: Path, strength: float) -> tuple[LoraFile, ModelPatcher]:
    if not runtime.has_cogvideox():
        raise CheckpointError("This ComfyUI has no CogVideoX of its own: connect Load MagicMirror, or update ComfyUI.")
    from . import native_lora

    file = native_lora.open_for(model, path)
    return file, native_lora.with_lora(model, file, strength) if strength else model
