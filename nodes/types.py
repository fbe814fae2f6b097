"""What travels between the nodes, and what their schemas share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from comfy_api.latest import io

if TYPE_CHECKING:
    from ..mm_core.pipelines.control import AdapterSettings
    from ..mm_core.pipelines.identity import Identity
    from ..mm_core.pipelines.lora import Lora
    from ..mm_core.pipelines.magic_mirror import MagicMirror

CATEGORY = "MagicMirror"
PROMPT = "A person img looks into the camera and smiles."
"""What a prompt begins with."""
MAX_SEED = 2**64 - 1
NOBODY = "The identity is of nobody: no face was found in its photos. Use another photo."

ModelSocket = io.Custom("MAGICMIRROR_MODEL")
IdentitySocket = io.Custom("MAGICMIRROR_IDENTITY")
ControlSocket = io.Custom("MAGICMIRROR_CONTROL")  # carries AdapterSettings


@dataclass(frozen=True, kw_only=True)
class Model:
    """What the socket of a model carries. It is never changed: Apply makes a new one that shares the weights."""

    mirror: MagicMirror
    face_pack: str
    identity: Identity | None = None
    settings: AdapterSettings | None = None
    loras: tuple[Lora, ...] = ()

    @property
    def patcher(self) -> object | None:
        """What core looks for in a node's output: where main memory is short, older ones with weights go first."""
        loaded = vars(self.mirror).get("loaded")
        return None if loaded is None else getattr(loaded.transformer, "patcher", None)


@dataclass(frozen=True, kw_only=True)
class Person:
    """What the socket of an identity carries: a person, or nobody where no face was found and that is allowed."""

    identity: Identity | None


# ComfyUI 0.3.75 takes neither of these two in its constructors, and passes over them when they are set afterwards.
def advanced(item: io.Input) -> io.Input:
    """Show an input only on demand."""
    item.extra_dict["advanced"] = True
    return item


def with_aliases(schema: io.Schema, *aliases: str) -> io.Schema:
    """Let the node search find a node by other words too."""
    schema.search_aliases = list(aliases)
    return schema
