"""Which model files are here, and one of them in a better format."""

from __future__ import annotations

import time

from comfy_api.latest import io

from . import catalog, runtime
from .types import CATEGORY, advanced, with_aliases

ALL = "all models"


class MagicMirrorModelDoctor(io.ComfyNode):
    """Looks into the model folders."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        schema = io.Schema(
            node_id="MagicMirrorModelDoctor",
            display_name="Model Doctor (MagicMirror)",
            category=CATEGORY,
            description="Lists every model file that this pack can use: found, missing or damaged, its size, the "
            "folder it belongs into, where it comes from, its licence. Downloads nothing.",
            is_output_node=True,
            inputs=[
                advanced(
                    io.Boolean.Input(
                        "check_hashes",
                        default=False,
                        optional=True,
                        tooltip="Read every file and show its SHA-256, compared with the published one where that is "
                        "known. Takes minutes.",
                    )
                ),
                advanced(
                    io.Boolean.Input(
                        "convert",
                        default=False,
                        optional=True,
                        tooltip="Once, write photomaker-v2.safetensors beside photomaker-v2.bin, a pickle, and "
                        "compare the two. The loader takes it from then on; the .bin stays. 1.8 GB of disk and memory.",
                    )
                ),
                io.Combo.Input(
                    "model",
                    options=[ALL, catalog.TINY, *catalog.HUB],
                    default=ALL,
                    optional=True,
                    tooltip="Which model the verdict at the top is about.",
                ),
            ],
            outputs=[io.String.Output(display_name="report", tooltip="What is shown on the node.")],
        )
        return with_aliases(schema, "missing models", "check models", "diagnose", "sha256", "model folders")

    @classmethod
    def fingerprint_inputs(cls, **inputs: object) -> int:
        """Look again each time: files come and go without any input changing."""
        return time.time_ns()

    @classmethod
    def execute(cls, check_hashes: bool = False, convert: bool = False, model: str = ALL) -> io.NodeOutput:
        from ..mm_core import doctor

        done = doctor.convert(catalog.folders()) + "\n" if convert else ""
        findings = doctor.find_models(catalog.folders())
        if check_hashes:
            total = sum(finding.size for finding in findings)
            findings = doctor.add_hashes(findings, runtime.progress_callback(total))
        verdict = doctor.verdict(findings, "" if model == ALL else model)
        text = done + "\n".join([verdict, doctor.report(findings)])
        problems = any(finding.state == doctor.PROBLEM for finding in findings)
        return io.NodeOutput(text, ui=runtime.show(text, warn=problems))
