"""A base model in memory: diffusers' pipeline with the adapter on it and a memory policy applied."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXPipeline

from ..hosts.cogvideox_diffusers import Attached, attach
from ..memory import apply_policy, choose_policy, let_go, needed_bytes, on_device, size_in_bytes, store_in_fp8
from ..models.adapter import MagicMirrorAdapter
from .base import BaseModel
from .lora import Lora, set_loras
from .preview import LatentPreview


@dataclass(kw_only=True)
class LoadedBase:
    """Transformer, VAE and adapter, ready to sample. The text encoder is apart: `text.PromptEncoder`."""

    pipe: CogVideoXPipeline
    attached: Attached | None
    """The adapter on the transformer."""
    policy: str
    """Resolved: one of `choices.POLICIES`."""
    preview: LatentPreview
    dtype: torch.dtype
    device: torch.device
    _loras: tuple[Lora, ...] | None = field(default=(), init=False)
    """On the transformer now; None after a failure."""

    @property
    def adapter(self) -> MagicMirrorAdapter | None:
        return None if self.attached is None else self.attached.adapter

    @property
    def needed_bytes(self) -> int:
        """Free device memory that a run wants."""
        return needed_bytes(self.policy, self.pipe)

    def set_loras(self, loras: Sequence[Lora]) -> None:
        """Take off the LoRAs of the clip before, unless they are the same, and put on these."""
        loras = tuple(loras)
        if loras == self._loras:
            return
        self._loras = None  # if this fails, the next clip starts anew
        hooked = self.policy in ("model", "sequential")
        if hooked:
            self.pipe.remove_all_hooks()
        try:
            set_loras(self.pipe, loras, self.dtype)
        finally:
            if hooked:
                apply_policy(self.policy, self.pipe, self.adapter, self.device)
        self._loras = loras

    def let_go(self) -> None:
        """After a run, however it ended, take away from the device what the policy does not keep there."""
        self.pipe.maybe_free_model_hooks()
        let_go(self.pipe.transformer, self.pipe.vae, *([self.adapter] if self.adapter else []))


@contextmanager
def vae_of(
    loaded: LoadedBase | None, base: BaseModel, dtype: torch.dtype, device: torch.device
) -> Iterator[AutoencoderKLCogVideoX]:
    """The VAE for a while, ready to decode; where nothing is loaded, it alone is read."""
    if loaded is None:
        vae = base.load_vae(dtype)
        with on_device([vae], device):
            yield vae
    else:
        try:
            yield loaded.pipe.vae
        finally:
            loaded.let_go()


def load_base(
    base: BaseModel,
    adapter: MagicMirrorAdapter | None,
    *,
    dtype: torch.dtype,
    fp8: bool,
    offload: str,
    device: torch.device,
    make_room: Callable[[int], None],
    text_bytes: int,
) -> LoadedBase:
    """Read the weights, put the adapter on, and let the weights rest where the policy has them.

    Args:
        fp8: store the large layers as 8-bit floats.
        offload: auto, or a policy.
        make_room: called with the bytes of all weights before any goes to the device.
        text_bytes: of the text encoder, which takes its turn on the device too.
    """
    pipe = base.load(dtype, text_encoder=False)
    pipe.set_progress_bar_config(disable=True)
    attached = None if adapter is None else attach(pipe.transformer, adapter)
    if fp8:
        store_in_fp8(pipe.transformer, adapter, dtype)
    sizes = [text_bytes, size_in_bytes(pipe.transformer), size_in_bytes(pipe.vae)]
    make_room(sum(sizes))
    policy = choose_policy(offload, sizes, device)
    apply_policy(policy, pipe, adapter, device)
    preview = LatentPreview(pipe.vae, device, lend=policy == "model", known=base.latent_rgb)
    return LoadedBase(pipe=pipe, attached=attached, policy=policy, preview=preview, dtype=dtype, device=device)
