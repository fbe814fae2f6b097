"""A person from photographs, and the person into the model."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
from comfy_api.latest import io, ui
from torch import Tensor

from ..mm_core.errors import NoFaceError, SettingError, packages
from . import catalog, runtime
from .control import adapter_inputs, adapter_settings, control_inputs
from .convert import count_pictures, image_from_photos, photos_from_images
from .types import CATEGORY, IdentitySocket, Model, ModelSocket, Person, advanced, with_aliases

if TYPE_CHECKING:
    from ..mm_core.faces.references import Photo
    from ..mm_core.pipelines.control import AdapterSettings
    from ..mm_core.pipelines.identity import Identity

BY_INDEX = "index"
FACES = ["largest", "leftmost", "rightmost", BY_INDEX]
CROPS = ["face", "image"]
MASKS = ["mask", "mask_2", "mask_3", "mask_4"]
ERROR, NO_IDENTITY, SKIP_PHOTO = "error", "no identity", "skip photo"

_CROP_SIZE = 224


class MagicMirrorExtractFaceEmbedding(io.ComfyNode):
    """Photographs of one person -> identity."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        more = "More photos of the same person, of any size."
        schema = io.Schema(
            node_id="MagicMirrorExtractFaceEmbedding",
            display_name="Extract Face Embedding (MagicMirror)",
            category=CATEGORY,
            description="Finds the person's face in each photo and encodes it. Several photos are averaged.",
            inputs=[
                ModelSocket.Input("model", tooltip="From Load MagicMirror."),
                io.Image.Input("image", tooltip="Photos of one person: upright, sharp, the face at least 112 px."),
                io.Image.Input("image_2", optional=True, tooltip=more),
                io.Image.Input("image_3", optional=True, tooltip=more),
                io.Image.Input("image_4", optional=True, tooltip=more),
                io.Combo.Input("face", options=FACES, default=FACES[0], tooltip="Which face to take from each photo."),
                io.Int.Input(
                    "face_index",
                    default=0,
                    min=0,
                    max=99,
                    tooltip='With face "index": the face\'s number, counted from 0 at the left of the picture.',
                ),
                io.Combo.Input(
                    "crop",
                    options=CROPS,
                    default=CROPS[0],
                    tooltip="What the image encoder sees. face: a square twice as large as the face. image: the "
                    "middle of the photo.",
                ),
                io.Combo.Input(
                    "on_no_face",
                    options=[ERROR, NO_IDENTITY, SKIP_PHOTO],
                    default=ERROR,
                    tooltip="When a photo shows no face: stop, go on with the base model alone, or leave the photo "
                    "out and stop only if none is left.",
                ),
                advanced(
                    io.String.Input(
                        "weights",
                        default="",
                        optional=True,
                        tooltip="How much each photo counts, one number a photo in their order: 1, 0.5 makes the first "
                        "count twice as much. 0 to 100; 0 leaves a photo out. Empty: all count the same.",
                    )
                ),
                *(
                    io.Mask.Input(
                        name,
                        optional=True,
                        tooltip="The mask of the same Load Image: what is transparent in a cut-out becomes grey.",
                    )
                    for name in MASKS
                ),
            ],
            outputs=[
                IdentitySocket.Output(display_name="identity"),
                io.Image.Output(display_name="faces", tooltip="What the image encoder saw of each photo."),
                io.String.Output(display_name="report", tooltip="What was found, and what will cost likeness."),
            ],
        )
        schema.is_output_node = True
        return with_aliases(schema, "face embedding", "photomaker", "arcface", "insightface", "face id")

    @classmethod
    def validate_inputs(cls, weights: str | None = None) -> bool | str:
        """Weights that are none are told before anything runs; how many photos there are is not known yet."""
        with packages():
            from ..mm_core.faces.references import parse_weights
        try:
            parse_weights(weights or "")  # None: they come from another node
        except SettingError as error:
            return str(error)
        return True

    @classmethod
    def execute(
        cls,
        model: Model,
        image: Tensor,
        face: str,
        face_index: int,
        crop: str,
        on_no_face: str,
        image_2: Tensor | None = None,
        image_3: Tensor | None = None,
        image_4: Tensor | None = None,
        weights: str = "",
        **masks: Tensor,
    ) -> io.NodeOutput:
        from ..mm_core.faces.references import check_number, look_at, parse_weights, references_from, with_faces

        batches = [image, image_2, image_3, image_4]
        check_number(count_pictures(batches))
        images = list(photos_from_images(batches, [masks.get(name) for name in MASKS]))
        counts = parse_weights(weights, len(images))
        analyzer = catalog.face_analyzer(model.face_pack)
        photos = look_at(analyzer, images, which=face_index if face == BY_INDEX else face, weights=counts)
        try:
            references = references_from(with_faces(photos) if on_no_face == SKIP_PHOTO else photos, crop=crop)
        except NoFaceError as error:
            if on_no_face != NO_IDENTITY:
                raise
            return cls._output(photos, None, f"NO IDENTITY, the base model will run alone: {error}")
        identity = model.mirror.identity(references, model.face_pack)
        left_out = [f"warning: {photo.name}: LEFT OUT, no face was found" for photo in photos if photo.taken is None]
        left_out += [
            f"photo {number}: LEFT OUT, its weight is 0" for number, weight in enumerate(counts or (), 1) if not weight
        ]
        return cls._output(photos, identity, "\n".join([*left_out, identity.report, *catalog.cautions(model)]))

    @classmethod
    def _output(cls, photos: list[Photo], identity: Identity | None, report: str) -> io.NodeOutput:
        """The node shows the photos with all faces framed, then the crops."""
        from ..mm_core.faces.drawing import draw_faces

        crops = np.zeros((1, _CROP_SIZE, _CROP_SIZE, 3), dtype=np.uint8) if identity is None else identity.crops
        faces = image_from_photos(crops)
        framed = [image_from_photos(draw_faces(photo.image, photo.faces, photo.taken)[None]) for photo in photos]
        pictures = ui.PreviewImage([picture for batch in (*framed, faces) for picture in batch])
        shown = pictures.as_dict() | runtime.show(report).as_dict()
        return io.NodeOutput(Person(identity=identity), faces, report, ui=shown)


class MagicMirrorApplyCANAdapter(io.ComfyNode):
    """Model + identity -> model that makes this person."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        schema = io.Schema(
            node_id="MagicMirrorApplyCANAdapter",
            display_name="Apply CAN Adapter (MagicMirror)",
            category=CATEGORY,
            description="Gives the model a person's identity. Bypass this node for plain CogVideoX.",
            inputs=[
                ModelSocket.Input("model", tooltip="From Load MagicMirror; it stays as it is."),
                IdentitySocket.Input("identity", tooltip="From Extract Face Embedding; replaces an earlier one."),
                *adapter_inputs(),
                *control_inputs(),
            ],
            outputs=[ModelSocket.Output(display_name="model", tooltip="For the sampler.")],
        )
        return with_aliases(schema, "can adapter", "apply identity", "magic mirror adapter")

    @classmethod
    def execute(
        cls, model: Model, identity: Person, control: AdapterSettings | None = None, **strengths: float | bool | str
    ) -> io.NodeOutput:
        settings = adapter_settings(control, **strengths)
        return io.NodeOutput(dataclasses.replace(model, identity=identity.identity, settings=settings))
