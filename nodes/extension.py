"""The list of nodes."""

from __future__ import annotations

import importlib.util

from comfy_api.latest import ComfyExtension, io

from . import runtime
from .control import MagicMirrorControl
from .doctor import MagicMirrorModelDoctor
from .examples import MagicMirrorExamplePerson
from .identity import MagicMirrorApplyCANAdapter, MagicMirrorExtractFaceEmbedding
from .identity_files import MagicMirrorLoadIdentity, MagicMirrorSaveIdentity
from .loaders import MagicMirrorLoader
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
        if importlib.util.find_spec("comfy.ldm.cogvideo") is not None:  # cores before it run on diffusers alone
            from .native import NODES as native
        nodes = [
            MagicMirrorLoader,
            MagicMirrorModelDoctor,
            MagicMirrorExtractFaceEmbedding,
            MagicMirrorApplyCANAdapter,
            MagicMirrorControl,
            MagicMirrorPromptHelper,
            MagicMirrorCogVideoXSampler,
            MagicMirrorVideoCombine,
            MagicMirrorScoreIdentity,
            MagicMirrorSaveIdentity,
            MagicMirrorLoadIdentity,
            MagicMirrorShots,
            MagicMirrorExamplePerson,
            *native,
        ]
        return [runtime.in_users_language(node) for node in nodes]
