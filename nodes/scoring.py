"""How much a clip resembles the person."""

from __future__ import annotations

import json

import numpy as np
from comfy_api.latest import io, ui
from torch import Tensor

from ..mm_core.errors import MagicMirrorError, SettingError
from . import catalog, runtime
from .convert import image_from_photos, photos_from_images
from .types import CATEGORY, NOBODY, IdentitySocket, Model, ModelSocket, Person, with_aliases

PASS_THROUGH, STOP = "pass through", "stop"


class MagicMirrorScoreIdentity(io.ComfyNode):
    """Frames + identity -> the most alike clip, a score, a plot."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        schema = io.Schema(
            node_id="MagicMirrorScoreIdentity",
            display_name="Score Identity (MagicMirror)",
            category=CATEGORY,
            description="Compares the face in every frame with the person's photos: a gate for good clips, and the "
            "best of several. Frames without a face are counted and left out.",
            is_output_node=True,
            inputs=[
                ModelSocket.Input("model", tooltip="The one that the identity was extracted with."),
                IdentitySocket.Input("identity", tooltip="From Extract Face Embedding."),
                io.Image.Input("images", tooltip="Frames of one clip, or of several of one length in a row."),
                io.Int.Input("clips", default=1, min=1, max=64, tooltip="How many clips the frames are of. 1 to 64."),
                io.Float.Input(
                    "threshold",
                    default=0.25,
                    min=-1.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Mean cosine to the photos, -1 to 1, from which a clip passes. Two photos of one person: "
                    "0.5 to 0.8; of different people: below 0.15.",
                ),
                io.Combo.Input(
                    "on_fail",
                    options=[PASS_THROUGH, STOP],
                    default=PASS_THROUGH,
                    tooltip="When no clip passes: go on with the best one, or stop the workflow.",
                ),
                io.Image.Input(
                    "centre",
                    optional=True,
                    tooltip="Pictures of many other people of the same kind (rendered, drawn): what all their faces "
                    "have in common is not counted as likeness.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="best", tooltip="The frames of the most alike clip."),
                io.Image.Output(display_name="plot", tooltip="Likeness over time, and the worst frame of each clip."),
                io.Boolean.Output(display_name="passed", tooltip="The best clip reaches the threshold."),
                io.Int.Output(display_name="best_index", tooltip="Counted from 0."),
                io.Float.Output(display_name="score", tooltip="Of the best clip, -1 to 1; -1 if it shows no face."),
                io.String.Output(display_name="report", tooltip="Every clip and frame, as JSON."),
            ],
        )
        return with_aliases(schema, "likeness", "face similarity", "best of", "identity score", "arcface")

    @classmethod
    def validate_inputs(cls, threshold: float | None = None) -> bool | str:
        """What is no cosine is told before a clip is sampled; None comes from another node."""
        return _threshold_problem(threshold) or True

    @classmethod
    def execute(
        cls,
        model: Model,
        identity: Person,
        images: Tensor,
        clips: int,
        threshold: float,
        on_fail: str,
        centre: Tensor | None = None,
    ) -> io.NodeOutput:
        if identity.identity is None:
            raise MagicMirrorError(NOBODY)
        if problem := _threshold_problem(threshold):
            raise SettingError(problem)
        if identity.identity.face_pack != model.face_pack:
            raise SettingError(
                f"The identity was made with the face models {identity.identity.face_pack}, the model has "
                f"{model.face_pack}: what two recognisers see cannot be compared. Choose the same face_pack."
            )
        from ..mm_core.evaluation.best_of import best_of, centre_of, split_clips
        from ..mm_core.evaluation.picture import draw

        batches = split_clips(np.stack(list(photos_from_images([images]))), clips)
        analyzer = catalog.face_analyzer(model.face_pack)
        result = best_of(
            analyzer,
            batches,
            np.stack([reference.face.embedding for reference in identity.identity.references]),
            threshold=threshold,
            centre=None if centre is None else centre_of(analyzer, list(photos_from_images([centre]))),
            on_frame=runtime.progress_callback(len(images)),
        )
        if on_fail == STOP and not result.passed:
            raise SettingError(
                f"No clip is alike enough: {result.summary}. Lower the threshold, try another seed, "
                f'or set on_fail to "{PASS_THROUGH}".'
            )
        plot = image_from_photos(draw(result, batches)[None])
        frames = len(images) // clips
        best = images[result.best * frames : (result.best + 1) * frames]
        shown = ui.PreviewImage(plot).as_dict() | runtime.show(result.summary, warn=not result.passed).as_dict()
        report = json.dumps(result.to_json())
        return io.NodeOutput(best, plot, result.passed, result.best, result.score, report, ui=shown)


def _threshold_problem(threshold: float | None) -> str | None:
    if not isinstance(threshold, (int, float)) or -1 <= threshold <= 1:  # what is no number, ComfyUI has told
        return None
    return f"threshold is {threshold}; it must be a number from -1 to 1."
