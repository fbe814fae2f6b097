"""How the model reads a prompt, before anything heavy runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comfy_api.latest import io

from . import runtime
from .types import CATEGORY, PROMPT, Model, ModelSocket, with_aliases

if TYPE_CHECKING:
    from ..mm_core.pipelines.prompt import PromptReport


class MagicMirrorPromptHelper(io.ComfyNode):
    """Prompt -> the same prompt, and a report of its tokens, which stands on the node too."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        schema = io.Schema(
            node_id="MagicMirrorPromptHelper",
            display_name="Prompt Helper (MagicMirror)",
            category=CATEGORY,
            description="Shows which word the identity takes, how many tokens the prompt has, and what is cut off at "
            "its end. Reads the tokenizer only; no weights are loaded.",
            is_output_node=True,
            inputs=[
                ModelSocket.Input("model", tooltip="From Load MagicMirror or Apply CAN Adapter."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    default=PROMPT,
                    tooltip='Up to 226 tokens (tiny: 48). Write "img" after the word that stands for the person.',
                ),
            ],
            outputs=[
                io.String.Output(display_name="prompt", tooltip="The prompt as it came, for the sampler."),
                io.String.Output(display_name="report", tooltip="What is shown on the node."),
            ],
        )
        return with_aliases(schema, "tokens", "token count", "trigger word", "prompt length")

    @classmethod
    def execute(cls, model: Model, prompt: str) -> io.NodeOutput:
        from ..mm_core.pipelines.prompt import explain_prompt

        mirror, settings = model.mirror, model.settings
        # Before Apply the prompt is shown as it will be read with an identity.
        off = settings is not None and (model.identity is None or not settings.fuses)
        report = explain_prompt(
            mirror.base.tokenizer,
            prompt,
            num_slots=0 if off or mirror.header is None else mirror.header.config.num_id_tokens,
            max_length=mirror.base.transformer_config["max_text_seq_length"],
        )
        text = _describe(report)
        return io.NodeOutput(prompt, text, ui=runtime.show(text, warn=bool(report.cautions)))


def _describe(report: PromptReport) -> str:
    lines = [f"{report.used} of {report.max_length} tokens, with the end mark."]
    if report.word is None:
        lines.append("No word takes an identity: the model has no adapter, or its identity is off.")
    else:
        places = f"token{'s' * (len(report.slots) > 1)} {' and '.join(str(slot + 1) for slot in report.slots)}"
        lines.append(f'The person: "{report.word}" ({" ".join(report.word_pieces)}); the identity takes {places}.')
    lines += report.cautions if report.cut else ["Nothing is cut off.", *report.cautions]
    return "\n".join([*lines, " ".join(report.pieces)])
