"""The list of nodes."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import runtime
from .control import MagicMirrorControl
from .doctor import MagicMirrorModelDoctor
from .examples import MagicMirrorExamplePerson
from .factors import MagicMirrorScaleFactors
from .identity import MagicMirrorApplyCANAdapter, MagicMirrorExtractFaceEmbedding
from .identity_files import MagicMirrorLoadIdentity, MagicMirrorSaveIdentity
from .loaders import MagicMirrorLoader
from .lora import MagicMirrorLoRA
from .prompting import MagicMirrorPromptHelper
from .sampling import MagicMirrorCogVideoXSampler
from .scoring import MagicMirrorScoreIdentity
from .shots import MagicMirrorShots
from .video import MagicMirrorVideoCombine


class MagicMirrorExtension(ComfyExtension):
    """This pack, as ComfyUI sees it."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        runtime.register_model_folders()
        native = []
        if runtime.has_cogvideox():  # cores without it run on diffusers alone
            from .native import NODES as native
        nodes = [
            MagicMirrorLoader,
            MagicMirrorModelDoctor,
            MagicMirrorExtractFaceEmbedding,
            MagicMirrorApplyCANAdapter,
            MagicMirrorControl,
            MagicMirrorLoRA,
            MagicMirrorPromptHelper,
            MagicMirrorCogVideoXSampler,
            MagicMirrorVideoCombine,
            MagicMirrorScoreIdentity,
            MagicMirrorScaleFactors,
            MagicMirrorSaveIdentity,
            MagicMirrorLoadIdentity,
            MagicMirrorShots,
            MagicMirrorExamplePerson,
            *native,
        ]
        return [runtime.in_users_language(node) for node in nodes]
