"""One person, several shots: prompts and seeds that ComfyUI runs one after the other."""

from __future__ import annotations

from comfy_api.latest import io

from ..mm_core.errors import SettingError
from .types import CATEGORY, MAX_SEED, with_aliases

MAX_SHOTS = 64


class MagicMirrorShots(io.ComfyNode):
    """A description and a list of shots -> a prompt and a seed for each."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        schema = io.Schema(
            node_id="MagicMirrorShots",
            display_name="Shots (MagicMirror)",
            category=CATEGORY,
            description="Prompts for several clips of one person. The nodes behind run once for each shot; core's "
            "Rebatch Images joins the clips into one video. The same line several times gives takes to choose from.",
            inputs=[
                io.String.Input(
                    "description",
                    default="A person img",
                    tooltip='Who it is, the beginning of every prompt. Write "img" after the word for the person.',
                ),
                io.String.Input(
                    "shots",
                    multiline=True,
                    default="looks towards the camera and smiles.\nturns left.",
                    tooltip=f"What happens, one shot a line, up to {MAX_SHOTS}. Empty lines are left out.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=MAX_SEED - MAX_SHOTS,
                    control_after_generate=True,
                    tooltip="Of the first shot; each further one has the next.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="prompts", is_output_list=True, tooltip="One for each shot."),
                io.Int.Output(display_name="seeds", is_output_list=True, tooltip="One for each shot."),
            ],
        )
        return with_aliases(schema, "multi shot", "storyboard", "scenes", "takes")

    @classmethod
    def execute(cls, description: str, shots: str, seed: int) -> io.NodeOutput:
        lines = [line.strip() for line in shots.splitlines() if line.strip()]
        if not 1 <= len(lines) <= MAX_SHOTS:
            raise SettingError(f"There are {len(lines)} shots; write 1 to {MAX_SHOTS}, one a line.")
        prompts = [f"{description.strip()} {line}".strip() for line in lines]
        return io.NodeOutput(prompts, [seed + number for number in range(len(lines))])
