"""A person to begin with, who comes with the pack."""

from __future__ import annotations

from comfy_api.latest import io, ui

from .convert import image_from_photos
from .types import CATEGORY, IdentitySocket, Person, with_aliases

# mm_core.examples has these too; a test compares them.
PEOPLE = ["woman", "man"]


class MagicMirrorExamplePerson(io.ComfyNode):
    """-> photos of a rendered person, and the person's identity for tiny."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        schema = io.Schema(
            node_id="MagicMirrorExamplePerson",
            display_name="Example Person (MagicMirror)",
            category=CATEGORY,
            description="A rendered person to try the workflows with: two photos, and the identity that the tiny model "
            "takes. Needs no face models and no download.",
            inputs=[io.Combo.Input("person", options=PEOPLE, default=PEOPLE[0], tooltip="Who. Nobody real.")],
            outputs=[
                io.Image.Output(display_name="photos", tooltip="Two, 384 x 384, for Extract Face Embedding."),
                IdentitySocket.Output(
                    display_name="identity", tooltip="For Apply CAN Adapter with tiny; other models need the photos."
                ),
            ],
        )
        return with_aliases(schema, "sample photo", "demo person", "example face", "test photo")

    @classmethod
    def execute(cls, person: str) -> io.NodeOutput:
        from ..mm_core.examples import example_identity, example_photos

        photos = image_from_photos(example_photos(person))
        return io.NodeOutput(photos, Person(identity=example_identity(person)), ui=ui.PreviewImage(photos))
