"""A prompt and a model become a clip."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from comfy_api.latest import InputImpl, Types, io
from safetensors.torch import save
from torch import Tensor

from ..mm_core.choices import AS_MODEL, DRAFT, SCHEDULERS, STEP_CACHES
from ..mm_core.errors import DecodeError, MagicMirrorError, SettingError
from ..mm_core.files import write_bytes
from ..mm_core.pipelines.control import AdapterSettings
from ..mm_core.pipelines.presets import PRESETS, ClipLimits
from . import runtime
from .convert import latent_from_samples
from .types import CATEGORY, MAX_SEED, PROMPT, Model, ModelSocket, with_aliases

if TYPE_CHECKING:
    from ..mm_core.pipelines.clip import ClipSettings
    from ..mm_core.pipelines.identity import Identity
    from ..mm_core.pipelines.magic_mirror import MagicMirror

MAX_SIDE = 2400
MAX_FRAMES = 161

_DEFAULT = PRESETS["CogVideoX-5b"]
_DEFAULT_LIMITS = ClipLimits.from_config(_DEFAULT.transformer, _DEFAULT.vae)
# What every base model demands; each one's own limits are checked when it is known.
_COMMON_LIMITS = dataclasses.replace(_DEFAULT_LIMITS, max_frames=MAX_FRAMES, max_height=MAX_SIDE, max_width=MAX_SIDE)

_undecoded: WeakKeyDictionary[MagicMirror, tuple[Identity | None, tuple[object, ...], Tensor]] = WeakKeyDictionary()
"""Of a model, the clip whose decoding was cancelled: the person, what else it was made of, its latents."""


class MagicMirrorCogVideoXSampler(io.ComfyNode):
    """Samples and decodes a clip, with the model's identity if it has one."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        schema = io.Schema(
            node_id="MagicMirrorCogVideoXSampler",
            display_name="CogVideoX Sampler (MagicMirror)",
            category=CATEGORY,
            description="Makes a clip from a prompt. With an identity the prompt names the person: a word followed by "
            '"img" ("a man img reading"), or a word such as man, woman, child, person.',
            inputs=_inputs(),
            outputs=[
                io.Image.Output(display_name="images"),
                io.Latent.Output(display_name="latent", tooltip="As core's VAE Decode takes it."),
                io.Video.Output(display_name="video", tooltip="At the frame rate that the model was trained on."),
                io.String.Output(display_name="report", tooltip="Warnings, the model, and what it sampled with."),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
        )
        return with_aliases(schema, "magic mirror sampler", "cogvideox", "text to video", "t2v")

    @classmethod
    def validate_inputs(cls, num_frames: int | None = None) -> bool | str:
        """Refuse lengths that no base model makes. None: connected, not known yet. 0: as the model.

        What is refused here shows once for each input that is named; sizes wait for the model, which has limits of its
        own.
        """
        try:
            known = isinstance(num_frames, int) and num_frames != 0  # what is no number, ComfyUI has told
            _COMMON_LIMITS.check(width=16, height=16, num_frames=num_frames if known else 1)
        except SettingError as error:
            return runtime.translated(error)
        return True

    @classmethod
    def execute(
        cls,
        model: Model,
        prompt: str,
        negative_prompt: str,
        width: int,
        height: int,
        num_frames: int,
        steps: int,
        guidance_scale: float,
        dynamic_guidance: bool,
        scheduler: str,
        seed: int,
        step_cache: str = STEP_CACHES[0],
    ) -> io.NodeOutput:
        from ..mm_core.pipelines.clip import ClipSettings

        base = model.mirror.base
        clip = ClipSettings.of_model(
            base.limits,
            base.sampling,
            prompt=prompt,
            negative_prompt=negative_prompt,
            width=width,
            height=height,
            num_frames=num_frames,
            steps=steps,
            guidance_scale=guidance_scale,
            dynamic_guidance=dynamic_guidance,
            scheduler=scheduler,
            seed=seed,
            step_cache=step_cache,
        )
        mirror, settings = model.mirror, model.settings or AdapterSettings()
        cautions = mirror.checks.cautions(clip, mirror.check(clip, model.identity, settings))
        plan = mirror.plan_line(clip, model.identity)
        report = "\n".join(filter(None, [*cautions, mirror.status, clip.summary, plan]))
        shown = runtime.show(report, warn=bool(cautions) or mirror.untrained)
        try:
            latents = _sampled(model, clip, settings)
            try:
                result = mirror.decode(latents)
            except runtime.Cancelled:
                _undecoded[mirror] = model.identity, (clip, settings, model.loras), latents
                raise
            except Exception as error:  # whatever it is, the sampled clip must not go with it
                raise rescued(error, latent_from_samples(latents, _scaling_factor(mirror)), cls.hidden) from error
        finally:
            runtime.release_memory()
        return io.NodeOutput(
            result.frames,
            latent_from_samples(result.latents, _scaling_factor(mirror)),
            InputImpl.VideoFromComponents(
                Types.VideoComponents(images=result.frames, audio=None, frame_rate=Fraction(result.fps))
            ),
            report,
            ui=shown,
        )


def _sampled(model: Model, clip: ClipSettings, settings: AdapterSettings) -> Tensor:
    """Latents; those that are there where the same clip was cancelled while it was decoded, as ComfyUI keeps the output
    of a sampler that is a node of its own."""
    identity, made_of, latents = _undecoded.pop(model.mirror, (None, (), None))
    if latents is not None and identity is model.identity and made_of == (clip, settings, model.loras):
        return latents
    return model.mirror.sample(clip, model.identity, settings, runtime.step_callback(clip.steps), model.loras)


def rescued(error: Exception, latent: dict[str, Tensor], hidden: io.HiddenHolder) -> DecodeError:
    """A failed decode, with the sampled latents in a file that core's Load Latent reads."""
    file = runtime.output_file("latents/magic_mirror", ".latent")
    tensors = {"latent_tensor": latent["samples"].contiguous(), "latent_format_version_0": torch.tensor([])}
    write_bytes(file, save(tensors, metadata=runtime.workflow_metadata(hidden)))
    told = str(error) if isinstance(error, MagicMirrorError) else f"{type(error).__name__}: {error}."
    return DecodeError(f"{told} The sampled clip is kept, as latents, in {file.path}.", latent["samples"])


def _scaling_factor(mirror: MagicMirror) -> float:
    return mirror.base.vae_config["scaling_factor"]


def _inputs() -> list[io.Input]:
    side = {"default": 0, "min": 0, "max": MAX_SIDE, "step": 16}
    return [
        ModelSocket.Input("model", tooltip="From Apply CAN Adapter; from Load MagicMirror for plain CogVideoX."),
        io.String.Input(
            "prompt",
            multiline=True,
            dynamic_prompts=True,
            default=PROMPT,
            tooltip='What happens, in up to 226 tokens. Write "img" after the word that stands for the person.',
        ),
        io.String.Input(
            "negative_prompt",
            multiline=True,
            dynamic_prompts=True,
            default="",
            tooltip="What should not be in the clip; needs a guidance_scale above 1.",
        ),
        io.Int.Input("width", **side, tooltip="Pixels, a multiple of 16. 0: as the model was trained."),
        io.Int.Input("height", **side, tooltip="Pixels, a multiple of 16. 0: as the model was trained."),
        io.Int.Input(
            "num_frames",
            default=0,
            min=0,
            max=MAX_FRAMES,
            tooltip="8 x N + 1 frames, up to 49 (CogVideoX 1.0); 16 x N + 1, up to 161 (1.5). 1 makes an image. 0: as "
            "the model was trained.",
        ),
        *_denoising_inputs(),
    ]


def _denoising_inputs() -> list[io.Input]:
    return [
        io.Int.Input("steps", default=0, min=0, max=1000, tooltip="Denoising steps. 0: as many as the model needs."),
        io.Float.Input(
            "guidance_scale",
            default=0.0,
            min=0.0,
            max=30.0,
            step=0.1,
            tooltip="How closely the clip follows the prompt; 1 switches guidance off and halves the time. 0: as suits "
            "the model.",
        ),
        io.Boolean.Input(
            "dynamic_guidance",
            default=True,
            tooltip="Let the guidance grow along the steps; goes with dpm. Only for a scheduler that is chosen here.",
        ),
        io.Combo.Input(
            "scheduler",
            options=[AS_MODEL, DRAFT, *SCHEDULERS],
            default=AS_MODEL,
            tooltip="CogVideoX's own samplers, dpm and ddim. draft, for a try: at most 16 steps, a third of the work "
            "of 50, and guidance that does not grow.",
        ),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=MAX_SEED,
            control_after_generate=True,
            tooltip="The same seed gives the same noise on every device.",
        ),
        io.Combo.Input(
            "step_cache",
            options=[*STEP_CACHES],
            default=STEP_CACHES[0],
            optional=True,  # workflows of before have none
            tooltip="Skip most of a step where little changes from the one before. off: every step in full. balanced: "
            "nearly the same clip. fast: less work, more deviation. Helps from about 20 steps on.",
        ),
    ]
