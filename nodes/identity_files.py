"""A person as a file: saved once, loaded in other workflows without the photos."""

from __future__ import annotations

from pathlib import Path

from comfy_api.latest import io, ui

from ..mm_core.errors import CheckpointError, MagicMirrorError
from . import runtime
from .convert import image_from_photos
from .types import CATEGORY, NOBODY, IdentitySocket, Model, ModelSocket, Person, with_aliases

SUFFIX = ".safetensors"


class MagicMirrorSaveIdentity(io.ComfyNode):
    """Identity -> a file that Load Identity lists."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        schema = io.Schema(
            node_id="MagicMirrorSaveIdentity",
            display_name="Save Identity (MagicMirror)",
            category=CATEGORY,
            description="Saves a person as a .safetensors file in models/magic_mirror_identities. It holds small face "
            "crops, not the photos, and restores this workflow when it is dropped onto the page.",
            is_output_node=True,
            inputs=[
                IdentitySocket.Input("identity", tooltip="From Extract Face Embedding."),
                io.String.Input(
                    "filename_prefix",
                    default="person",
                    tooltip="Start of the file's name; may name a folder (people/anna), %date:yyyy-MM-dd%, and a "
                    "widget (%Node.widget%). A number follows; no file is replaced.",
                ),
            ],
            outputs=[io.String.Output(display_name="path", tooltip="Where the file is.")],
        )
        return with_aliases(schema, "save person", "save face embedding", "export identity")

    @classmethod
    def validate_inputs(cls, filename_prefix: str | None = None) -> bool | str:
        """A name that no file may have is told before anything runs."""
        return runtime.prefix_problem(filename_prefix, SUFFIX, runtime.IDENTITIES) or True

    @classmethod
    def execute(cls, identity: Person, filename_prefix: str) -> io.NodeOutput:
        from ..mm_core.pipelines.identity_file import save_identity

        if identity.identity is None:
            raise MagicMirrorError(NOBODY)
        file = runtime.new_model_file(runtime.IDENTITIES, filename_prefix, SUFFIX, cls.hidden)
        path = save_identity(identity.identity, file, metadata=runtime.workflow_metadata(cls.hidden))
        crops = ui.PreviewImage(image_from_photos(identity.identity.crops))
        return io.NodeOutput(str(path), ui=crops.as_dict() | runtime.show(f"Saved {path}").as_dict())


class MagicMirrorLoadIdentity(io.ComfyNode):
    """A file that Save Identity wrote -> identity."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        schema = io.Schema(
            node_id="MagicMirrorLoadIdentity",
            display_name="Load Identity (MagicMirror)",
            category=CATEGORY,
            description="Loads a person that Save Identity saved, for a model with the same ID encoder.",
            inputs=[
                ModelSocket.Input("model", tooltip="From Load MagicMirror; its ID encoder must be the file's."),
                io.Combo.Input(
                    "file",
                    options=runtime.model_files(runtime.IDENTITIES, SUFFIX),
                    tooltip="A .safetensors file in models/magic_mirror_identities. The page's Model Library shows "
                    "their faces.",
                ),
            ],
            outputs=[
                IdentitySocket.Output(display_name="identity"),
                io.Image.Output(display_name="faces", tooltip="What the image encoder saw of each photo."),
                io.String.Output(display_name="report", tooltip="What was found, and what will cost likeness."),
            ],
        )
        return with_aliases(schema, "load person", "load face embedding", "import identity")

    @classmethod
    def validate_inputs(cls, file: str | None = None) -> bool | str:
        """A missing file is told before anything runs; the list of files may be older than the file."""
        if file is None:  # it comes from another node
            return True
        try:
            _find(file)
        except CheckpointError as error:
            return runtime.translated(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, file: str | None = None, **others: object) -> str:
        """A file that is replaced under the same name counts as another person."""
        if file is None:
            return ""
        path = _find(file)
        return repr((str(path), path.stat().st_mtime_ns, path.stat().st_size))

    @classmethod
    def execute(cls, model: Model, file: str) -> io.NodeOutput:
        from ..mm_core.pipelines.identity_file import load_identity

        identity = load_identity(_find(file), encoder=model.mirror.id_encoder.fingerprint)
        faces = image_from_photos(identity.crops)
        shown = ui.PreviewImage(faces).as_dict() | runtime.show(f"{file}\n{identity.report}").as_dict()
        return io.NodeOutput(Person(identity=identity), faces, identity.report, ui=shown)


def _find(file: str | None) -> Path:
    if not file:  # what the page sends while there are no files to choose from
        folder = runtime.model_folders(runtime.IDENTITIES)[0]
        raise CheckpointError(f"No identity was chosen. Save Identity writes them into {folder}; reload the page then.")
    return runtime.model_file(runtime.IDENTITIES, file)
