"""The identity on ComfyUI's own CogVideoX: its loaders, LoRA, samplers, offloading. Needs a core that has it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from comfy_api.latest import io

from ..mm_core.errors import CheckpointError, DecodeError, SettingError
from ..mm_core.pipelines.presets import latent_shape
from . import native_base, native_lora, native_model, native_sampling, runtime
from .control import adapter_inputs, adapter_settings, control_inputs
from .sampling import rescued
from .types import CATEGORY, PROMPT, IdentitySocket, Model, ModelSocket, Person, with_aliases

if TYPE_CHECKING:
    from ..mm_core.pipelines.control import AdapterSettings, Window
    from ..mm_core.pipelines.magic_mirror import MagicMirror
    from .native_model import ModelPatcher

NATIVE = f"{CATEGORY}/native"


class MagicMirrorNativeModel(io.ComfyNode):
    """MAGICMIRROR_MODEL -> MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        schema = io.Schema(
            node_id="MagicMirrorNativeModel",
            display_name="CogVideoX Model (MagicMirror, native)",
            category=NATIVE,
            description="The base model that Load MagicMirror chose, as ComfyUI's own MODEL. Takes files with "
            "diffusers' names, which core's loader does not; a MODEL from core's loader serves as well.",
            inputs=[ModelSocket.Input("magic_mirror", tooltip="From Load MagicMirror.")],
            outputs=[io.Model.Output(display_name="model")],
        )
        return with_aliases(schema, "cogvideox native", "diffusers to comfyui")

    @classmethod
    def execute(cls, magic_mirror: Model) -> io.NodeOutput:
        mirror = magic_mirror.mirror
        model = native_base.corrected(native_model.core_model(mirror), mirror.base)
        for lora in magic_mirror.loras:
            model = native_lora.with_lora(model, lora.file, lora.strength)
        return io.NodeOutput(model)


class MagicMirrorApplyNative(io.ComfyNode):
    """MODEL + identity + prompt -> MODEL that makes this person, and the prompt's conditioning."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        schema = io.Schema(
            node_id="MagicMirrorApplyNative",
            display_name="Apply CAN Adapter (MagicMirror, native)",
            category=NATIVE,
            description="Gives ComfyUI's own CogVideoX a person's identity. Bypassed, the model is core's, unchanged.",
            inputs=[
                io.Model.Input(
                    "model", tooltip="CogVideoX text-to-video, 1.0 or 1.5, from any loader; with LoRA or not."
                ),
                ModelSocket.Input("magic_mirror", tooltip="From Load MagicMirror: its adapter and tokenizer are used."),
                IdentitySocket.Input("identity", tooltip="From Extract Face Embedding."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    default=PROMPT,
                    tooltip='Write "img" after the word that stands for the person.',
                ),
                *adapter_inputs(),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="T5-XXL from the core's Load CLIP, type cogvideox. Without one, the base model's own "
                    "encoder does.",
                ),
                *control_inputs(),
            ],
            outputs=[
                io.Model.Output(display_name="model"),
                io.Conditioning.Output(display_name="positive", tooltip="The prompt, with the person in it."),
            ],
        )
        return with_aliases(schema, "native can adapter", "apply identity", "cogvideox identity")

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        magic_mirror: Model,
        identity: Person,
        prompt: str,
        clip: Any = None,
        control: AdapterSettings | None = None,
        **strengths: float | bool | str,
    ) -> io.NodeOutput:
        from ..mm_core.pipelines.prompt import without_trigger

        mirror, settings = magic_mirror.mirror, adapter_settings(control, **strengths)
        model = native_base.corrected(model, mirror.base)

        def plain() -> torch.Tensor:
            return _encode(mirror, clip, without_trigger(prompt))

        if identity.identity is None or settings.off:
            return io.NodeOutput(model, _conditioning(plain()))
        if mirror.header is None:
            raise CheckpointError("Load MagicMirror has no adapter: choose one there.")
        mirror.checks.of_identity(identity.identity)
        tokens = mirror.checks.tokens(prompt, settings)
        text, slots = (plain(), ()) if tokens is None else (_encode(mirror, clip, tokens.ids), tokens.slots)
        adapter = native_model.adapter_of(mirror, native_sampling.compute_dtype(model))
        person = native_model.encode_native(adapter.adapter, identity.identity, text, slots, settings)
        if tokens is None:
            positive = _conditioning(person.prompt)
        else:
            positive = _in_window(person.prompt, settings.windows[0], plain)
        return io.NodeOutput(native_model.with_identity(model, adapter, person, settings), positive)


class MagicMirrorEncodePrompt(io.ComfyNode):
    """Text -> CONDITIONING, by the base model's own text encoder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MagicMirrorEncodePrompt",
            display_name="Encode Prompt (MagicMirror, native)",
            category=NATIVE,
            description="Text for ComfyUI's own CogVideoX from the base model's text encoder, for the negative prompt. "
            "If the text encoder comes from Load CLIP, use the core's own CLIP Text Encode instead.",
            inputs=[
                ModelSocket.Input("magic_mirror", tooltip="From Load MagicMirror."),
                io.String.Input("text", multiline=True, default="", tooltip="Usually what the clip should not show."),
            ],
            outputs=[io.Conditioning.Output(display_name="conditioning")],
        )

    @classmethod
    def execute(cls, magic_mirror: Model, text: str) -> io.NodeOutput:
        return io.NodeOutput(_conditioning(_encode(magic_mirror.mirror, None, text)))


class MagicMirrorNativeSampling(io.ComfyNode):
    """What SamplerCustom needs for CogVideoX."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        schema = io.Schema(
            node_id="MagicMirrorNativeSampling",
            display_name="CogVideoX DDIM (MagicMirror, native)",
            category=NATIVE,
            description="Sampler and noise levels for SamplerCustom and SamplerCustomAdvanced, as CogVideoX was "
            "trained. KSampler fits too: sampler euler, scheduler simple.",
            inputs=[
                io.Model.Input("model", tooltip="CogVideoX; its noise levels are used."),
                io.Int.Input(
                    "steps", default=0, min=0, max=1000, tooltip="Denoising steps. 0: as many as the model needs."
                ),
            ],
            outputs=[io.Sampler.Output(display_name="sampler"), io.Sigmas.Output(display_name="sigmas")],
        )
        return with_aliases(schema, "cogvideox sampler", "ddim", "sigmas")

    @classmethod
    def execute(cls, model: ModelPatcher, steps: int) -> io.NodeOutput:
        native_base.check_known(model)
        steps = steps or native_base.sampling_steps(model)
        return io.NodeOutput(native_sampling.DDIM(), native_sampling.trailing_sigmas(model, steps))


class MagicMirrorNativeLatent(io.ComfyNode):
    """An empty LATENT of a base model's own shape."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        side = {"default": 0, "min": 0, "max": 1440, "step": 16}
        return io.Schema(
            node_id="MagicMirrorNativeLatent",
            display_name="Empty CogVideoX Latent (MagicMirror, native)",
            category=NATIVE,
            description="An empty clip for the sampler, of a size that the base model can make.",
            inputs=[
                ModelSocket.Input("magic_mirror", tooltip="From Load MagicMirror; its limits are checked."),
                io.Int.Input("width", **side, tooltip="Pixels, a multiple of 16. 0: as the model was trained."),
                io.Int.Input("height", **side, tooltip="Pixels, a multiple of 16. 0: as the model was trained."),
                io.Int.Input(
                    "num_frames",
                    default=0,
                    min=0,
                    max=161,
                    tooltip="8 x N + 1 frames (1.5: 16 x N + 1). 0: as the model was trained.",
                ),
            ],
            outputs=[io.Latent.Output(display_name="latent")],
        )

    @classmethod
    def execute(cls, magic_mirror: Model, width: int, height: int, num_frames: int) -> io.NodeOutput:
        base = magic_mirror.mirror.base
        limits = base.limits
        width, height, num_frames = width or limits.width, height or limits.height, num_frames or limits.num_frames
        limits.check(width=width, height=height, num_frames=num_frames)
        config = base.transformer_config
        _, frames, *sides = latent_shape(base.vae_config, frames=num_frames, height=height, width=width)
        frames += -frames % (config["patch_size_t"] or 1)
        return io.NodeOutput({"samples": torch.zeros(1, config["in_channels"], frames, *sides)})


class MagicMirrorDecode(io.ComfyNode):
    """LATENT -> IMAGE, by the base model's own VAE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MagicMirrorDecode",
            display_name="Decode CogVideoX Latent (MagicMirror, native)",
            category=NATIVE,
            description="Frames from latents by the base model's own VAE, in tiles where memory is short. For the "
            "published models core's VAE Decode does the same with less memory.",
            inputs=[
                ModelSocket.Input("magic_mirror", tooltip="From Load MagicMirror."),
                io.Latent.Input("samples", tooltip="From a sampler."),
            ],
            outputs=[io.Image.Output(display_name="images")],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def execute(cls, magic_mirror: Model, samples: dict[str, Any]) -> io.NodeOutput:
        mirror, latents = magic_mirror.mirror, samples["samples"]
        channels = mirror.base.transformer_config["in_channels"]
        if latents.ndim != 5 or latents.shape[1] != channels or 0 in latents.shape[2:]:
            raise SettingError(
                f"The latents have the shape {tuple(latents.shape)}; {mirror.base.name} decodes (1, {channels}, "
                "frames, height, width). Connect what its own sampler gives."
            )
        if len(latents) != 1:
            raise SettingError(f"There are {len(latents)} latents; one clip at a time is decoded.")
        if latents.shape[2] % 2 == 0:  # 1.5 fills up to whole patches in front
            latents = latents[:, :, 1:]
        try:
            frames = mirror.decode(latents * mirror.base.vae_config["scaling_factor"]).frames
        except DecodeError as error:
            raise rescued(error, samples, cls.hidden) from error
        finally:
            runtime.release_memory()
        return io.NodeOutput(frames)


def _encode(mirror: MagicMirror, clip: Any, text: str | list[int]) -> torch.Tensor:
    """(1, T, Dtxt) on the CPU, of a prompt or of token ids, by ComfyUI's CLIP or by the base model's own encoder."""
    if clip is None:
        return mirror.encode_text(text)
    if isinstance(text, str):
        tokens = clip.tokenize(text)
    else:
        (name,) = clip.tokenize("").keys()
        tokens = {name: [[(token, 1.0) for token in text]]}
    return clip.encode_from_tokens(tokens).cpu()


def _conditioning(embeds: torch.Tensor) -> list:
    return [[embeds, {}]]


def _in_window(fused: torch.Tensor, window: Window, plain: Callable[[], torch.Tensor]) -> list:
    """Conditioning with the fused prompt inside a window and the plain one, encoded only if there is one, outside."""
    outside = [(start, end) for start, end in ((0.0, window.start), (window.end, 1.0)) if start < end]
    if not outside:
        return _conditioning(fused)  # a range would let core read the noise level from the device at every step
    embeds = plain()
    positive = [[fused, {"start_percent": window.start, "end_percent": window.end}]]
    return positive + [[embeds, {"start_percent": start, "end_percent": end}] for start, end in outside]


NODES = [
    MagicMirrorNativeModel,
    MagicMirrorApplyNative,
    MagicMirrorEncodePrompt,
    MagicMirrorNativeSampling,
    MagicMirrorNativeLatent,
    MagicMirrorDecode,
]
