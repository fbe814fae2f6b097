"""How strongly, and when, the identity acts: what both Apply nodes share, and finer control in a node of its own."""

from __future__ import annotations

import dataclasses

from comfy_api.latest import io

from ..mm_core.pipelines.control import BALANCED, CONTROLS, CUSTOM, MAX_STRENGTH, AdapterSettings, Window
from . import runtime
from .types import CATEGORY, ControlSocket, advanced, with_aliases

MAX_WEIGHT = 2.0


class MagicMirrorControl(io.ComfyNode):
    """A preset, or a strength, start and end for each part of the identity -> control."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        schema = io.Schema(
            node_id="MagicMirrorControl",
            display_name="Control (MagicMirror)",
            category=CATEGORY,
            description="How strongly, and at which steps, each part of the identity acts. For Apply CAN Adapter, on "
            "either route.",
            inputs=[
                io.Combo.Input(
                    "preset",
                    options=[*CONTROLS, CUSTOM],
                    default=BALANCED,
                    tooltip="Starting points, not measured optima. balanced: all parts at 1, at every step. likeness "
                    "first: CAN 1.1, attention to the face 1.2. motion first: both 0.8, and only in the first 0.6 of "
                    "the steps. custom: the advanced inputs.",
                ),
                *_part("identity", "how far the person's word becomes this person.", "the plain prompt is read."),
                *_part("can", "how strongly the identity shifts the statistics of each layer (CAN).", "CAN is off."),
                *_part("ip", "how strongly the video attends to the face itself.", "there is no face to attend to."),
                *_switches(),
            ],
            outputs=[ControlSocket.Output(display_name="control", tooltip="For Apply CAN Adapter, on either route.")],
        )
        return with_aliases(schema, "identity strength", "preset", "start percent", "end percent", "schedule")

    @classmethod
    def execute(
        cls,
        preset: str,
        identity_in_negative: bool = False,
        id_branch: bool = True,
        structure_branch: bool = True,
        face_modulation: bool = True,
        can: bool = True,
        **custom: float,
    ) -> io.NodeOutput:
        settings = _custom_settings(**custom) if preset == CUSTOM else CONTROLS[preset]
        settings = _switched(settings, identity_in_negative, id_branch, structure_branch, face_modulation, can)
        return io.NodeOutput(settings, ui=runtime.show(f"{preset}: {settings.summary()}"))


def _part(name: str, strength: str, outside: str) -> list[io.Input]:
    """Strength, start and end of one part of the identity."""
    inputs = [
        _strength(f"{name}_scale", f"{CUSTOM}: {strength}", optional=True),
        _position(f"{name}_start_percent", 0.0, f"{CUSTOM}: before this part of the steps {outside}", optional=True),
        _position(f"{name}_end_percent", 1.0, f"{CUSTOM}: after this part of the steps {outside}", optional=True),
    ]
    return [advanced(item) for item in inputs]


def _custom_settings(
    *,
    identity_scale: float = 1.0,
    identity_start_percent: float = 0.0,
    identity_end_percent: float = 1.0,
    can_scale: float = 1.0,
    can_start_percent: float = 0.0,
    can_end_percent: float = 1.0,
    ip_scale: float = 1.0,
    ip_start_percent: float = 0.0,
    ip_end_percent: float = 1.0,
) -> AdapterSettings:
    """The values of `_part`. Raises SettingError for one out of its range."""
    return AdapterSettings(
        identity_scale=identity_scale,
        can_scale=can_scale,
        ip_scale=ip_scale,
        identity_window=Window(identity_start_percent, identity_end_percent),
        can_window=Window(can_start_percent, can_end_percent),
        ip_window=Window(ip_start_percent, ip_end_percent),
    )


def adapter_inputs() -> list[io.Input]:
    """What both Apply nodes have, beside `control_inputs`, for `adapter_settings`: for who wants more than those."""
    parts = [
        _strength("identity_scale", "How far the person's word in the prompt becomes this person."),
        _strength("can_scale", "How strongly the identity shifts the statistics of each layer (CAN)."),
        _strength("ip_scale", "How strongly the video attends to the face itself."),
        _position("start_percent", 0.0, "Before this part of the steps the base model runs alone."),
        _position("end_percent", 1.0, "After this part of the steps it does again."),
    ]
    return [advanced(item) for item in parts] + _switches()


def _switches() -> list[io.Input]:
    """What is for research."""
    return [
        _switch("identity_in_negative", False, "Give the negative prompt's half the identity too."),
        _switch("id_branch", True, "Ablation: the recogniser's embedding, in the prompt and in CAN."),
        _switch("structure_branch", True, "Ablation: the face's structure, and the attention to it."),
        _switch("face_modulation", True, "Ablation: the face stream's own modulation."),
        _switch("can", True, "Ablation: conditioned adaptive normalization."),
    ]


def control_inputs() -> list[io.Input]:
    """The last inputs of an Apply node: workflows of before have none of them."""
    return [
        ControlSocket.Input(
            "control", optional=True, tooltip="From Control: takes the place of all strengths, start and end here."
        ),
        io.Float.Input(
            "weight",
            default=1.0,
            min=0.0,
            max=MAX_WEIGHT,
            step=0.05,
            optional=True,
            tooltip="How strongly the person acts, in all parts. 0 (off) to 2; 1 as trained.",
        ),
        io.Combo.Input(
            "preset",
            options=[*CONTROLS],
            default=BALANCED,
            optional=True,
            tooltip="balanced: as trained. likeness first: closer to the photo. motion first: livelier, closer to the "
            "prompt. Starting points, not measured optima.",
        ),
    ]


def adapter_settings(
    control: AdapterSettings | None,
    *,
    identity_scale: float,
    can_scale: float,
    ip_scale: float,
    start_percent: float,
    end_percent: float,
    identity_in_negative: bool = False,
    id_branch: bool = True,
    structure_branch: bool = True,
    face_modulation: bool = True,
    can: bool = True,
    weight: float = 1.0,
    preset: str = BALANCED,
) -> AdapterSettings:
    """The values of `adapter_inputs` and `control_inputs`. Raises SettingError for one out of its range."""
    if control is None:
        chosen = CONTROLS[preset]

        def within(window: Window | None) -> Window | None:
            """The part of a preset's window in that of the node."""
            if window is None:
                return None
            start = max(window.start, start_percent)
            return Window(start, max(start, min(window.end, end_percent)))

        control = AdapterSettings(
            identity_scale=weight * chosen.identity_scale * identity_scale,
            can_scale=weight * chosen.can_scale * can_scale,
            ip_scale=weight * chosen.ip_scale * ip_scale,
            start=start_percent,
            end=end_percent,
            identity_window=within(chosen.identity_window),
            can_window=within(chosen.can_window),
            ip_window=within(chosen.ip_window),
        )
    return _switched(control, identity_in_negative, id_branch, structure_branch, face_modulation, can)


def _switched(
    settings: AdapterSettings,
    identity_in_negative: bool,
    id_branch: bool,
    structure_branch: bool,
    face_modulation: bool,
    can: bool,
) -> AdapterSettings:
    """Settings with the values of `_switches`: what is off here or there is off."""
    return dataclasses.replace(
        settings,
        in_negative=settings.in_negative or identity_in_negative,
        id_branch=settings.id_branch and id_branch,
        structure_branch=settings.structure_branch and structure_branch,
        face_modulation=settings.face_modulation and face_modulation,
        can=settings.can and can,
    )


def _strength(name: str, purpose: str, optional: bool = False) -> io.Input:
    return io.Float.Input(
        name, default=1.0, min=0.0, max=MAX_STRENGTH, step=0.05, optional=optional, tooltip=f"{purpose} 0 (off) to 3."
    )


def _position(name: str, default: float, purpose: str, optional: bool = False) -> io.Input:
    return io.Float.Input(
        name, default=default, min=0.0, max=1.0, step=0.01, optional=optional, tooltip=f"{purpose} 0 to 1."
    )


def _switch(name: str, default: bool, purpose: str) -> io.Input:
    return advanced(io.Boolean.Input(name, default=default, optional=True, tooltip=purpose))
