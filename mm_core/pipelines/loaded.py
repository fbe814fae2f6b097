"""A base model in memory: diffusers' pipeline with the adapter on it, its weights in somebody's charge."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from diffusers import AutoencoderKLCogVideoX

from ..choices import QUANTISED
from ..hosts.cogvideox_diffusers import Attached, attach
from ..memory import Part, Residence, sampling_parts, store_in_fp8
from ..models.adapter import MagicMirrorAdapter
from .base import BaseModel
from .kernels import Kernels, set_kernels
from .lora import Lora, set_loras
from .parts import Pipeline
from .preview import LatentPreview


@dataclass(kw_only=True)
class LoadedBase:
    """Transformer, VAE and adapter, ready to sample. The text encoder is apart: `text.PromptEncoder`."""

    pipe: Pipeline
    attached: Attached | None
    """The adapter on the transformer."""
    residence: Residence
    transformer: Part
    """With the layers of the adapter that every step runs."""
    vae: Part
    preview: LatentPreview
    dtype: torch.dtype
    _loras: tuple[Lora, ...] | None = field(default=(), init=False)
    """On the transformer now; None after a failure."""

    @property
    def device(self) -> torch.device:
        """Where clips are sampled."""
        return self.transformer.device

    def set_loras(self, loras: Sequence[Lora]) -> None:
        """Take off the LoRAs of the clip before, unless they are the same, and put on these."""
        loras = tuple(loras)
        if loras == self._loras:
            return
        self._loras = None  # if this fails, the next clip starts anew
        # The VAE too: diffusers refuses while any part of its pipeline has hooks.
        with self.transformer.changing(), self.vae.changing():
            set_loras(self.pipe, loras, self.dtype)
        self._loras = loras


@contextmanager
def vae_of(
    loaded: LoadedBase | None, base: BaseModel, dtype: torch.dtype, residence: Residence, beside: int
) -> Iterator[tuple[AutoencoderKLCogVideoX, torch.device]]:
    """The VAE for a while, ready to decode, and where; if nothing is loaded, it alone is read. beside: bytes."""
    if loaded is None:
        vae = base.load_vae(dtype)
        part = residence.part("vae", [vae])
    else:
        vae, part = loaded.pipe.vae, loaded.vae
    with part.ready(beside):
        yield vae, part.device


def load_base(
    base: BaseModel,
    adapter: MagicMirrorAdapter | None,
    *,
    dtype: torch.dtype,
    vae_dtype: torch.dtype,
    stored: str | None,
    kernels: Kernels,
    residence: Residence,
) -> LoadedBase:
    """Read the weights, put the adapter on, and give the weights into their residence's charge.

    stored: fp8, or one of `choices.QUANTISED`, for the large layers.
    """
    pipe = base.load(dtype, text_encoder=False, quantised=stored if stored in QUANTISED else None)
    if vae_dtype != dtype:
        pipe.register_modules(vae=base.load_vae(vae_dtype))
    pipe.set_progress_bar_config(disable=True)
    attached = None if adapter is None else attach(pipe.transformer, adapter)
    set_kernels(pipe.transformer, attached, kernels, residence.device("transformer"))
    if stored == "fp8":
        store_in_fp8(pipe.transformer, adapter, dtype)
    weights, twice = [pipe.transformer], []
    if adapter is not None:
        weights += sampling_parts(adapter)
        twice = [pipe.transformer.transformer_blocks[layer] for layer in adapter.config.adapted_layers]
    transformer, vae = residence.part("transformer", weights, twice), residence.part("vae", [pipe.vae])
    pipe.execution_device = transformer.device
    return LoadedBase(
        pipe=pipe,
        attached=attached,
        residence=residence,
        transformer=transformer,
        vae=vae,
        preview=LatentPreview(pipe.vae, transformer.device, known=base.latent_rgb),
        dtype=dtype,
    )
