"""The whole method: photos and a prompt become a clip of that person."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoints.adapter_file import AdapterHeader, load_adapter, read_header
from ..choices import STORED
from ..errors import SettingError
from ..faces.references import Reference
from ..memory import Offloading, Residence, check_policy, default_device
from ..models.adapter import MagicMirrorAdapter
from .base import BaseModel, TinyBase
from .checks import Checks
from .clip import Clip, ClipSettings, StepCallback
from .control import AdapterSettings
from .decode import choose_tiles, decode, decode_bytes
from .disk_cache import DiskCache
from .identity import Identity, IdentityEncoder
from .kernels import Kernels, check_kernels
from .loaded import LoadedBase, load_base, vae_of
from .lora import Lora
from .parts import Pipeline
from .plan import Plan, plan_of
from .prompt import IdentityTokens
from .sampling import sample
from .text import prompt_encoder, token_ids


class MagicMirror:
    """A base model with an adapter and an ID encoder, each loaded when it is first needed.

    Args:
        base: the CogVideoX model.
        adapter: an adapter file; None for the base model alone. `tiny` brings its own.
        id_encoder: `photomaker-v2.bin`; `tiny` brings its own.
        precision: auto, bf16, fp16, fp32, or what the transformer is stored in: fp8, int8, nf4.
        offload: auto, none, model, group, sequential.
        attention: one of `choices.ATTENTIONS`, the kernel of all attention in the transformer.
        compile: compile the transformer's blocks; the first clip of a size takes minutes longer.
        context_parallel: share each clip with the other processes of torch.distributed, which do the same.
        device: where to compute; the accelerator by default.
        residence: who decides both of these instead, such as ComfyUI.
        cache: a folder for what the text and ID encoders make of prompts and photos; None to keep nothing on disk.

    Raises:
        CheckpointError: the adapter file is damaged or was made for a base of other sizes. Weights are not read yet.
        SettingError: an unknown precision or attention, one that needs a package or another device, or that `offload`
            does not take; compiling where torch cannot.
    """

    def __init__(
        self,
        base: BaseModel,
        *,
        adapter: Path | None = None,
        id_encoder: Path | None = None,
        precision: str = "auto",
        offload: str = "auto",
        attention: str = "native",
        compile: bool = False,
        context_parallel: bool = False,
        device: torch.device | None = None,
        residence: Residence | None = None,
        cache: Path | None = None,
    ) -> None:
        self.base, self.residence = base, residence or Offloading(offload, device or default_device())
        self.dtype = self.residence.dtype("transformer", precision)
        self._vae_dtype = self.residence.dtype("vae", precision)
        self._stored = precision if precision in STORED else None
        check_policy(self.residence.policy, precision)
        self._kernels = Kernels(attention=attention, compile=compile, context_parallel=context_parallel)
        check_kernels(self._kernels, self.residence.device("transformer"), self.dtype)
        self._settled: Residence | None = None
        if isinstance(base, TinyBase):
            adapter, id_encoder = adapter or base.adapter, id_encoder or base.id_encoder
        self.adapter_path, kept = adapter, None if cache is None else DiskCache(cache)
        self.id_encoder = IdentityEncoder(id_encoder, self.dtype, self.residence, kept)
        text_dtype = self.residence.dtype("text_encoder", precision)
        self.text = prompt_encoder(base, text_dtype, self.residence, self._stored, kept)
        self.header: AdapterHeader | None = None if adapter is None else read_header(adapter)
        if self.header is not None:
            self.header.check_fits(base.transformer_config, adapter=adapter.name, base=base.name)
        self.checks = Checks(base, self.header)

    @property
    def status(self) -> str:
        """One line about base and adapter, to show to the user."""
        return f"{self.base.name}: " + ("no adapter" if self.header is None else str(self.header.trained))

    @property
    def untrained(self) -> bool:
        """The adapter's weights are random, which is to be told wherever they are used."""
        return self.header is not None and self.header.trained.stage == "untrained"

    @cached_property
    def adapter(self) -> MagicMirrorAdapter | None:
        return None if self.header is None else load_adapter(self.adapter_path, dtype=self.dtype)[0]

    @cached_property
    def loaded(self) -> LoadedBase:
        """Transformer and VAE with the adapter on them, in their residence's charge."""
        return load_base(
            self.base, self.adapter, dtype=self.dtype, vae_dtype=self._vae_dtype, stored=self._stored,
            kernels=self._kernels, residence=self._settled or self.residence,
        )  # fmt: skip

    @property
    def pipeline(self) -> Pipeline:
        """diffusers' pipeline of `loaded`; it has no text encoder."""
        return self.loaded.pipe

    def unload(self) -> None:
        """Let go of all weights, to be read again when needed."""
        vars(self).pop("loaded", None)
        vars(self).pop("adapter", None)
        self.id_encoder.unload()
        self.text.unload()

    def identity(self, references: Sequence[Reference], face_pack: str | None = None) -> Identity:
        """Encode photos of one person; see `IdentityEncoder.identity`."""
        return self.id_encoder.identity(references, face_pack)

    def check(self, clip: ClipSettings, identity: Identity | None, settings: AdapterSettings) -> IdentityTokens | None:
        """Raise whatever would stop the clip, before the base model is loaded; returns the prompt's identity tokens."""
        if self._kernels.context_parallel and clip.step_cache != "off":
            raise SettingError(
                f"step_cache is {clip.step_cache} and context_parallel is on: each process would judge its own part of "
                "a step. Set step_cache to off."
            )
        return self.checks.of_clip(clip, identity, settings)

    def plan(self, clip: ClipSettings, identity: Identity | None = None) -> Plan | None:
        """What the clip needs of the device, before anything is loaded; None on a CPU, where weights compute in place.
        """
        if self.residence.device("transformer").type == "cpu":
            return None
        photos = {} if identity is None else {"tokens": identity.features.structure_tokens[..., 0].numel()}
        return plan_of(
            text=self.base.text_config,
            transformer=self.base.transformer_config,
            vae=self.base.vae_config,
            adapter=None if self.header is None else self.header.config,
            clip=clip,
            dtype=self.dtype,
            vae_dtype=self._vae_dtype,
            stored=self._stored,
            device=self.residence.device("transformer"),
            **photos,
        )

    def plan_line(self, clip: ClipSettings, identity: Identity | None = None) -> str | None:
        """The plan, and what follows from the memory that is free now, to show to the user; None on a CPU."""
        plan = self.plan(clip, identity)
        if plan is None:
            return None
        residence = self._settled or self.residence.settled(plan.choose)
        return plan.line(residence.policy, residence.memory("transformer"))

    def sample(
        self,
        clip: ClipSettings,
        identity: Identity | None = None,
        settings: AdapterSettings | None = None,
        on_step: StepCallback | None = None,
        loras: Sequence[Lora] = (),
    ) -> Tensor:
        """Sample latents, (1, C, F', H / 8, W / 8). Without identity, or with all strengths 0, this is plain CogVideoX.
        The LoRAs act on this clip and on no other. Raises as `Checks.of_clip` and `sampling.sample`."""
        settings = settings or AdapterSettings()
        tokens, plan = self.check(clip, identity, settings), self.plan(clip, identity)
        if plan is not None and self._settled is None:
            self._settled = self.residence.settled(plan.choose)
        loaded = self.loaded
        loaded.set_loras(loras)
        encode = partial(self.encode_text, residence=loaded.residence)
        beside = 0 if plan is None else max(plan.beside["identity"], plan.beside["steps"])
        return sample(loaded, encode, clip, None if settings.off else identity, tokens, settings, on_step, beside)

    def decode(self, latents: Tensor) -> Clip:
        """Decode sampled latents. Raises DecodeError, which carries them, when that fails."""
        memory, config = self.residence.memory("vae"), self.base.vae_config
        beside = 0
        if memory is not None:  # the largest tiles that the device allows at all
            tiles = choose_tiles(config, self._vae_dtype, latents.shape, memory[1] * 9 // 10)
            beside = decode_bytes(config, self._vae_dtype, latents.shape, tiles)
        loaded = vars(self).get("loaded")
        with vae_of(loaded, self.base, self._vae_dtype, self.residence, beside) as (vae, device):
            memory = self.residence.memory("vae")
            frames = decode(vae, latents, device, None if memory is None else memory[0])
        return Clip(frames=frames, latents=latents, fps=self.base.limits.fps)

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

    def encode_text(self, text: str | Sequence[int], residence: Residence | None = None) -> Tensor:
        """T5 embeddings of a prompt or of token ids, (1, T, Dtxt) on the CPU, without the rest of the base model."""
        ids = token_ids(self.base, text) if isinstance(text, str) else text
        return self.text.encode(ids, residence or self.residence).to(self.dtype)
