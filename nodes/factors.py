"""What the adapter does to the base's modulation, as a picture."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..mm_core.errors import MagicMirrorError
from . import runtime
from .convert import image_from_photos
from .types import CATEGORY, NOBODY, IdentitySocket, Model, ModelSocket, Person, with_aliases


class MagicMirrorScaleFactors(io.ComfyNode):
    """Model + identity -> the scale factors of every adapted block (paper, Fig. 13)."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        schema = io.Schema(
            node_id="MagicMirrorScaleFactors",
            display_name="Scale Factors (MagicMirror)",
            category=CATEGORY,
            description="Draws by t-SNE how the adapter scales video, text and face tokens, by layer and time step. "
            "Needs matplotlib and scikit-learn.",
            is_output_node=True,
            inputs=[
                ModelSocket.Input("model", tooltip="From Load MagicMirror."),
                IdentitySocket.Input("identity", tooltip="From Extract Face Embedding."),
                io.Int.Input("steps", default=12, min=1, max=100, tooltip="Time steps to draw. 1 to 100."),
            ],
            outputs=[
                io.Image.Output(display_name="plot", tooltip="Points that are near each other have like factors."),
                io.String.Output(display_name="report", tooltip="What is shown on the node."),
            ],
        )
        return with_aliases(schema, "modulation", "t-sne", "adaptive normalization", "can factors")

    @classmethod
    def execute(cls, model: Model, identity: Person, steps: int) -> io.NodeOutput:
        if identity.identity is None:
            raise MagicMirrorError(NOBODY)
        from ..mm_core.evaluation.factors import check_drawing, draw_factors, scale_factors

        check_drawing()
        try:
            factors = scale_factors(model.mirror, identity.identity, steps, model.loras)
        finally:
            runtime.release_memory()
        plot = image_from_photos(draw_factors(factors)[0][None])
        report = f"{model.mirror.status}\n{factors.summary}"
        shown = ui.PreviewImage(plot).as_dict() | runtime.show(report, warn=model.mirror.untrained).as_dict()
        return io.NodeOutput(plot, report, ui=shown)
