"""The whole method: photos and a prompt become a clip of that person.

The denoising loop is diffusers' own `CogVideoXPipeline`; this file prepares what the identity adds and hands it over.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler, CogVideoXPipeline
from torch import Tensor

from ..checkpoints.adapter_file import AdapterHeader, load_adapter, read_header
from ..checkpoints.photomaker import FILE_NAME, REPO, fingerprint, load_id_encoder, read_fingerprint
from ..errors import CheckpointError
from ..faces.references import Reference
from ..memory import (
    apply_policy,
    choose_policy,
    compute_dtype,
    default_device,
    needed_bytes,
    on_device,
    sampling_parts,
    size_in_bytes,
    store_in_fp8,
)
from ..models.adapter import MagicMirrorAdapter
from ..models.diffusers_block import attach
from ..models.id_encoder import IDEncoder
from .base import BaseModel, TinyBase
from .clip import Clip, ClipSettings, StepCallback
from .conditioning import FaceConditioning, condition
from .control import AdapterSettings
from .decode import decode
from .denoise import denoise
from .identity import Identity, encode_identity
from .lora import Lora, set_loras
from .preview import fit_latent_rgb, preview_image
from .prompt import IdentityTokens, identity_tokens, without_trigger

SCHEDULERS = {"ddim": CogVideoXDDIMScheduler, "dpm": CogVideoXDPMScheduler}

_KEPT_EMBEDS = 8  # prompts; 2 MB each


class MagicMirror:
    """A base model with an adapter and an ID encoder, each loaded when it is first needed.

    Args:
        base: the CogVideoX model.
        adapter: an adapter file; None for the base model alone. `tiny` brings its own.
        id_encoder: `photomaker-v2.bin`; `tiny` brings its own.
        precision: auto, bf16, fp16, fp32, or fp8 (storage of the transformer).
        offload: auto, none, model, group, sequential.
        device: where to compute; the accelerator by default.
        make_room: called with a number of bytes before they are needed on the device; a host such as ComfyUI then lets
            other models go.

    Raises:
        CheckpointError: the adapter file is damaged or was made for a base of other sizes. Weights are not read yet.
    """

    def __init__(
        self,
        base: BaseModel,
        *,
        adapter: Path | None = None,
        id_encoder: Path | None = None,
        precision: str = "auto",
        offload: str = "auto",
        device: torch.device | None = None,
        make_room: Callable[[int], None] = lambda size: None,
    ) -> None:
        self.base = base
        self.device = device or default_device()
        self.dtype = compute_dtype(precision, self.device)
        self._precision, self._offload, self._make_room = precision, offload, make_room
        if isinstance(base, TinyBase):
            adapter, id_encoder = adapter or base.adapter, id_encoder or base.id_encoder
        self.adapter_path, self._id_encoder_path = adapter, id_encoder
        self._embeds: dict[str | tuple[int, ...], Tensor] = {}
        self.header = self._read_header()

    def _read_header(self) -> AdapterHeader | None:
        """The adapter's header, checked against the base; None without an adapter."""
        if self.adapter_path is None:
            return None
        header = read_header(self.adapter_path)
        header.check_fits(self.base.transformer_config, adapter=self.adapter_path.name, base=self.base.name)
        return header

    @property
    def status(self) -> str:
        """One line about base and adapter, to show to the user."""
        return f"{self.base.name}: " + ("no adapter" if self.header is None else str(self.header.trained))

    @cached_property
    def id_encoder(self) -> IDEncoder:
        """PhotoMaker-V2's encoder, or one of another size."""
        if self._id_encoder_path is None:
            raise CheckpointError(f"No ID encoder was chosen. It is {FILE_NAME} of https://huggingface.co/{REPO}.")
        return load_id_encoder(self._id_encoder_path, dtype=self.dtype)

    @cached_property
    def encoder_fingerprint(self) -> str:
        """A hash of the weights of the ID encoder, the same at every precision. Raises CheckpointError without one."""
        if self._id_encoder_path is None:
            return fingerprint(self.id_encoder.state_dict())
        return read_fingerprint(self._id_encoder_path)

    @cached_property
    def pipeline(self) -> CogVideoXPipeline:
        """diffusers' pipeline with the adapter attached and the memory policy applied."""
        pipe = self.base.load(self.dtype)
        self._loras: tuple[Lora, ...] | None = ()
        pipe.set_progress_bar_config(disable=True)
        if self.adapter is not None:
            attach(pipe.transformer, self.adapter)
        self.latent_rgb = fit_latent_rgb(pipe.vae)
        if self._precision == "fp8":
            store_in_fp8(pipe, self.dtype)
        self._make_room(sum(size_in_bytes(part) for part in (pipe.text_encoder, pipe.transformer, pipe.vae)))
        self._policy = choose_policy(self._offload, pipe, self.device)
        apply_policy(self._policy, pipe, self.adapter, self.device)
        return pipe

    @cached_property
    def adapter(self) -> MagicMirrorAdapter | None:
        if self.header is None:
            return None
        return load_adapter(self.adapter_path, dtype=self.dtype)[0]

    def unload(self) -> None:
        """Let go of all weights; they load again when they are asked for."""
        for part in ("pipeline", "adapter", "id_encoder"):
            vars(self).pop(part, None)  # cached properties
        self._embeds.clear()

    def identity(self, references: list[Reference], face_pack: str | None = None) -> Identity:
        """Encode photos of one person; see `faces.references.analyse_references`.

        face_pack: the name of the face models that found them; an identity file tells it.
        """
        identity = encode_identity(references, self.id_encoder, self.device)
        return replace(identity, encoder=self.encoder_fingerprint, face_pack=face_pack)

    def check(self, clip: ClipSettings, identity: Identity | None, settings: AdapterSettings) -> IdentityTokens | None:
        """Raise whatever would stop the clip, before the base model is loaded; returns the prompt's identity tokens.

        Raises:
            SettingError: a size or length that the model cannot make.
            PromptError: no identity word, or one cut off.
            CheckpointError: an identity but no adapter, or one from another encoder.
        """
        if identity is None or settings.off:
            self.base.limits.check(width=clip.width, height=clip.height, num_frames=clip.num_frames)
            return None
        tokens = self.check_prompt(clip, settings)
        self.check_identity(identity)
        return tokens

    def check_identity(self, identity: Identity) -> None:
        """Raise CheckpointError for an identity from another encoder."""
        config = self.header.config
        seen = (*identity.features.id_tokens.shape[1:], identity.features.structure_tokens.shape[-1])
        wanted = (config.num_id_tokens, config.id_token_dim, config.clip_hidden_size)
        if seen != wanted:
            raise CheckpointError(
                f"The identity was extracted by another encoder: tokens of {seen}, where the adapter takes {wanted}. "
                "Extract it again with this model."
            )

    def check_prompt(self, clip: ClipSettings, settings: AdapterSettings) -> IdentityTokens | None:
        """The part of `check` that needs no photo yet."""
        self.base.limits.check(width=clip.width, height=clip.height, num_frames=clip.num_frames)
        if self.header is None:
            raise CheckpointError(f"An identity is given, but {self.base.name} was loaded without an adapter.")
        return self.identity_tokens(clip.prompt, settings)

    def identity_tokens(self, prompt: str, settings: AdapterSettings) -> IdentityTokens | None:
        """The prompt's tokens with room for the identity; None where the settings leave the prompt as it is."""
        if not settings.fuses:
            return None
        return identity_tokens(
            self.base.tokenizer,
            prompt,
            num_slots=self.header.config.num_id_tokens,
            max_length=self.base.transformer_config["max_text_seq_length"],
        )

    def sample(
        self,
        clip: ClipSettings,
        identity: Identity | None = None,
        settings: AdapterSettings | None = None,
        on_step: StepCallback | None = None,
        loras: Sequence[Lora] = (),
    ) -> Tensor:
        """Sample latents, (1, C, F', H / 8, W / 8). Without identity, or with all strengths 0, this is plain CogVideoX.

        loras: act on this clip and on no other.

        Raises:
            as `check`; whatever `on_step` raises, with the device freed as after a finished run.
        """
        settings = settings or AdapterSettings()
        tokens = self.check(clip, identity, settings)
        pipe = self.pipeline
        self._set_loras(tuple(loras))
        self._make_room(needed_bytes(self._policy, pipe))
        pipe.scheduler, last = _watched_scheduler(SCHEDULERS[clip.scheduler], pipe.scheduler.config)
        with_identity = identity is not None and not settings.off

        def report(step: int) -> None:
            if on_step is not None:
                on_step(step, clip.steps, lambda: preview_image(last["x0"], self.latent_rgb))

        try:
            prompt = self._embed(without_trigger(clip.prompt))
            negative = self._embed(clip.negative_prompt) if clip.guidance_scale > 1 else None
            face = self._condition(clip, identity, settings, tokens, prompt) if with_identity else None
            with on_device(sampling_parts(self.adapter) if face else [], self.device):
                latents = denoise(pipe, clip, prompt, negative, face, report)
        finally:
            pipe.maybe_free_model_hooks()
        return latents.permute(0, 2, 1, 3, 4).cpu()

    def decode(self, latents: Tensor) -> Clip:
        """Decode sampled latents. Raises DecodeError, which carries them, when no tiling fits in memory."""
        try:
            return Clip(frames=decode(self.pipeline, latents), latents=latents, fps=self.base.limits.fps)
        finally:
            self.pipeline.maybe_free_model_hooks()

    def generate(
        self,
        clip: ClipSettings,
        identity: Identity | None = None,
        settings: AdapterSettings | None = None,
        on_step: StepCallback | None = None,
        loras: Sequence[Lora] = (),
    ) -> Clip:
        """`sample`, then `decode`."""
        return self.decode(self.sample(clip, identity, settings, on_step, loras))

    def _set_loras(self, loras: tuple[Lora, ...]) -> None:
        """Take off the LoRAs of the clip before, unless they are the same, and put on these."""
        if loras == self._loras:
            return
        self._loras = None  # if this fails, the next clip starts anew
        hooked = self._policy in ("model", "sequential")
        if hooked:
            self.pipeline.remove_all_hooks()
        try:
            set_loras(self.pipeline, loras, self.dtype)
        finally:
            if hooked:
                apply_policy(self._policy, self.pipeline, None, self.device)
        self._loras = loras

    @torch.no_grad()
    def _embed(self, text: str | tuple[int, ...]) -> Tensor:
        """T5 embeddings of a prompt, as CogVideoXPipeline makes them, or of token ids: (1, T, Dtxt) on the device.

        The last few are kept on the CPU. Another seed asks for the same ones, and T5 is as large as the transformer.
        """
        if text not in self._embeds:
            pipe = self.pipeline
            if isinstance(text, str):
                length = self.base.transformer_config["max_text_seq_length"]
                embeds, _ = pipe.encode_prompt(text, do_classifier_free_guidance=False, max_sequence_length=length)
            else:
                embeds = pipe.text_encoder(torch.tensor([text], device=pipe._execution_device))[0]
            if len(self._embeds) == _KEPT_EMBEDS:
                del self._embeds[next(iter(self._embeds))]
            self._embeds[text] = embeds.to("cpu", self.dtype)
        return self._embeds[text].to(self.device)

    @torch.no_grad()
    def encode_text(self, text: str | list[int]) -> Tensor:
        """T5 embeddings of a prompt or of token ids, (1, T, Dtxt) on the CPU, without the rest of the base model."""
        if isinstance(text, str):
            length = self.base.transformer_config["max_text_seq_length"]
            text = self.base.tokenizer(text, padding="max_length", max_length=length, truncation=True)["input_ids"]
        encoder = self.base.load_text_encoder(self.dtype)
        with on_device([encoder], self.device):
            return encoder(torch.tensor([text], device=self.device))[0].cpu()

    @torch.no_grad()
    def _condition(
        self,
        clip: ClipSettings,
        identity: Identity,
        settings: AdapterSettings,
        tokens: IdentityTokens | None,
        prompt: Tensor,
    ) -> FaceConditioning:
        pipe = self.pipeline
        # Without guidance there is no unconditional half.
        settings = replace(settings, in_negative=settings.in_negative and clip.guidance_scale > 1)
        if tokens is not None:
            prompt = self._embed(tuple(tokens.ids))
        pipe.scheduler.set_timesteps(clip.steps)
        return condition(
            self.adapter,
            pipe.transformer,
            identity,
            prompt,
            tokens.slots if tokens else (),
            pipe.scheduler.timesteps,
            settings,
            self.device,
        )


def _watched_scheduler(cls: type, config: Any) -> tuple[Any, dict[str, Tensor]]:
    """A scheduler that also notes each step's estimate of the clean latents, for previews: `x_t` is mostly noise."""
    scheduler, last = cls.from_config(config), {}
    step = scheduler.step

    @functools.wraps(step)
    def watched(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        result = step(*args, **kwargs)
        last["x0"] = result[1]
        return result

    scheduler.step = watched
    return scheduler, last
