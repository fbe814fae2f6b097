"""Magic Mirror for ComfyUI: a person from photographs, in a video that CogVideoX makes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from comfy_api.latest import ComfyExtension

WEB_DIRECTORY = "./web"  # the nodes' help pages, in docs/, and what shows on the canvas what they say


async def comfy_entrypoint() -> ComfyExtension:
    """What ComfyUI asks for the pack's nodes."""
    from .nodes.extension import MagicMirrorExtension

    return MagicMirrorExtension()
