"""Choosing a base model, its adapter and its ID encoder. Configs and headers are read here, weights by the sampler."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from comfy_api.latest import io

from ..mm_core.choices import ATTENTIONS, OFFLOADING, check_precision, precisions
from ..mm_core.errors import CheckpointError, SettingError
from ..mm_core.folders import check_name
from . import catalog, runtime
from .types import CATEGORY, Model, ModelSocket, advanced, with_aliases

if TYPE_CHECKING:
    from ..mm_core.pipelines.magic_mirror import MagicMirror

# The models that some node's output still holds. The same choice gives the same object: another face pack, or a second
# loader, does not load the weights again.
_open: WeakValueDictionary[tuple[object, ...], MagicMirror] = WeakValueDictionary()


class MagicMirrorLoader(io.ComfyNode):
    """Base model + adapter + ID encoder -> model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        schema = io.Schema(
            node_id="MagicMirrorLoader",
            display_name="Load MagicMirror",
            category=CATEGORY,
            description="Chooses a CogVideoX model, the adapter that gives it a person's identity, and the ID encoder. "
            "Weights are loaded when the first clip is sampled.",
            inputs=[*_model_inputs(), *_memory_inputs(), *_single_file_inputs(), *_kernel_inputs()],
            outputs=[
                ModelSocket.Output(display_name="model", tooltip="For Extract Face Embedding and Apply CAN Adapter."),
                io.String.Output(display_name="status", tooltip="Base model, and what the adapter was trained on."),
            ],
        )
        return with_aliases(schema, "magic mirror", "cogvideox", "identity video", "id-preserving video")

    @classmethod
    def validate_inputs(
        cls,
        base_model: str | None = None,
        adapter: str | None = None,
        id_encoder: str | None = None,
        precision: str | None = None,
    ) -> bool | str:
        """Names that lead out of their folders, and a precision without its package, are told before anything runs;
        None comes from another node, and `execute` looks at it. Others that are not in the lists pass: `execute` says
        into which folder the missing file belongs, and may download it. The inputs that are not looked at here must be
        in their lists, ComfyUI sees to it.
        """
        try:
            for name in (base_model, adapter, id_encoder):
                if name is not None:
                    check_name(name)
            if precision is not None:
                check_precision(precision)
        except (CheckpointError, SettingError) as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, **choices: object) -> str:
        """Files that are replaced under the same name, or another face pack that is there now, are another model."""
        pack, base = choices.get("face_pack"), choices.get("base_model")
        found = catalog.find_face_pack(pack, str(base)) if isinstance(pack, str) else None
        return repr((_versions(choices), found))

    @classmethod
    def execute(
        cls,
        base_model: str,
        adapter: str,
        id_encoder: str,
        face_pack: str,
        precision: str,
        offload: str,
        allow_download: bool,
        text_encoder: str = catalog.NONE,
        vae: str = catalog.NONE,
        attention: str = ATTENTIONS[0],
        compile: bool = False,
    ) -> io.NodeOutput:
        from ..mm_core.pipelines.magic_mirror import MagicMirror
        from .runtime_memory import ComfyUI

        catalog.check_base(base_model)
        adapter_file = catalog.find_adapter(adapter, base_model)
        face_pack = catalog.find_face_pack(face_pack, base_model)
        if allow_download:
            catalog.fetch_face_pack(face_pack)
        base = catalog.open_base(base_model, text_encoder=text_encoder, vae=vae, allow_download=allow_download)
        encoder_file = catalog.find_id_encoder(id_encoder, base_model, adapter, allow_download)
        files = dict(base_model=base_model, adapter=adapter, id_encoder=id_encoder, text_encoder=text_encoder, vae=vae)
        key = (base, adapter_file, encoder_file, precision, offload, attention, compile, *_versions(files))
        mirror = _open.get(key) or MagicMirror(
            base,
            adapter=adapter_file,
            id_encoder=encoder_file,
            precision=precision,
            attention=attention,
            compile=compile,
            residence=ComfyUI(offload),
            cache=runtime.cache_folder(),
        )
        _open[key] = mirror
        return io.NodeOutput(Model(mirror=mirror, face_pack=face_pack), mirror.status, ui=runtime.show(mirror.status))


def _model_inputs() -> list[io.Input]:
    return [
        io.Combo.Input(
            "base_model",
            options=catalog.base_models(),
            default=catalog.TINY,
            tooltip="tiny: built in, trained on rendered people, 64 px, to try the workflow. THUDM/...: the published "
            "models; diffusers folders in models/CogVideo and models/diffusers; single files in "
            "models/diffusion_models.",
        ),
        io.Combo.Input(
            "adapter",
            options=catalog.adapters(),
            default=catalog.AUTO,
            tooltip="A .safetensors file in models/magic_mirror, made for this base model. auto: tiny's own. none: the "
            "base model alone, without identity.",
        ),
        io.Combo.Input(
            "id_encoder",
            options=catalog.id_encoders(),
            default=catalog.AUTO,
            tooltip="PhotoMaker-V2's photomaker-v2.bin in models/photomaker. auto: its safetensors copy, else that "
            "file, or tiny's own one.",
        ),
        io.Combo.Input(
            "face_pack",
            options=catalog.face_packs(),
            default=catalog.AUTO,
            tooltip="insightface's models in models/insightface/models, for non-commercial research only. auto: those "
            "that are there; tiny prefers buffalo_sc.",
        ),
    ]


def _memory_inputs() -> list[io.Input]:
    return [
        io.Combo.Input(
            "precision",
            options=precisions(),
            default="auto",
            tooltip="auto: bf16 where the GPU has it, else fp16; fp32 on a CPU. fp8 and int8 store the transformer in "
            "half the memory, nf4 in a quarter, int8 and nf4 the text encoder in half, and compute as auto does. int8 "
            "needs the package torchao, nf4 bitsandbytes too.",
        ),
        io.Combo.Input(
            "offload",
            options=list(OFFLOADING),
            default="auto",
            tooltip="Where weights rest while they are not needed. auto, model: as ComfyUI decides, which unloads and "
            "shows them as its own models. none: never a transformer in part. group, sequential: as much in main "
            "memory as ComfyUI can, the slowest and smallest.",
        ),
        io.Boolean.Input(
            "allow_download",
            default=False,
            tooltip="Fetch a published base model (about 20 GB) and the ID encoder (2 GB) from huggingface.co, and the "
            "face pack (below half a GB) from github.com, when they are missing. A download that was cut off goes on "
            "where it stopped.",
        ),
    ]


def _single_file_inputs() -> list[io.Input]:
    purpose = "Only for a base model that is a single file."
    return [
        advanced(
            io.Combo.Input(
                "text_encoder",
                options=[catalog.NONE, *runtime.model_files("text_encoders", ".safetensors")],
                default=catalog.NONE,
                optional=True,
                tooltip=f"{purpose} The T5-XXL encoder, such as t5xxl_fp16.safetensors in models/text_encoders.",
            )
        ),
        advanced(
            io.Combo.Input(
                "vae",
                options=[catalog.NONE, *runtime.model_files("vae", ".safetensors")],
                default=catalog.NONE,
                optional=True,
                tooltip=f"{purpose} CogVideoX's VAE in models/vae.",
            )
        ),
    ]


def _kernel_inputs() -> list[io.Input]:
    return [
        advanced(
            io.Combo.Input(
                "attention",
                options=list(ATTENTIONS),
                default=ATTENTIONS[0],
                optional=True,
                tooltip="The kernel of the transformer's attention. native: torch's own. flash, sage and xformers are "
                "packages to install; sage computes in 8 bits, faster and a little off.",
            )
        ),
        advanced(
            io.Boolean.Input(
                "compile",
                default=False,
                optional=True,
                tooltip="Compile the transformer's blocks with torch.compile: the first clip of a size takes minutes "
                "longer, the others less. Needs torch 2.8 and Triton.",
            )
        ),
    ]


def _versions(choices: Mapping[str, object]) -> list[tuple[str, int, int]]:
    """Path, time and size of each file that the choices stand for."""
    files = [(str(path), path.stat()) for path in catalog.files_behind(choices)]
    return [(path, stat.st_mtime_ns, stat.st_size) for path, stat in files]
