"""The list of nodes."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import runtime
from .doctor import MagicMirrorModelDoctor
from .identity import MagicMirrorApplyCANAdapter, MagicMirrorExtractFaceEmbedding
from .loaders import MagicMirrorLoader
from .prompting import MagicMirrorPromptHelper
from .sampling import MagicMirrorCogVideoXSampler
from .scoring import MagicMirrorScoreIdentity
from .video import MagicMirrorVideoCombine


class MagicMirrorExtension(ComfyExtension):
    """This pack, as ComfyUI sees it."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        runtime.register_model_folders()
        return [
            MagicMirrorLoader,
            MagicMirrorModelDoctor,
            MagicMirrorExtractFaceEmbedding,
            MagicMirrorApplyCANAdapter,
            MagicMirrorPromptHelper,
            MagicMirrorCogVideoXSampler,
            MagicMirrorVideoCombine,
            MagicMirrorScoreIdentity,
        ]
