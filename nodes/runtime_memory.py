"""Our weights in the charge of ComfyUI's model management: what it may evict, load in part and show."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import comfy.model_management as management
import comfy.model_patcher
import comfy.ops
import torch
from comfy.cli_args import args
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXSafeConv3d
from torch import nn

from ..mm_core.choices import STORED, check_precision
from ..mm_core.memory import Offloading, Part, check_fp8, compute_dtype, is_quantised, size_in_bytes

_TYPES = [torch.bfloat16, torch.float16, torch.float32]
_OPS = comfy.ops.disable_weight_init


class _SafeConv3d(CogVideoXSafeConv3d, _OPS.Conv3d):
    """The convolution of CogVideoX's VAE."""


# Layers, and what core has in their place: the same, but a weight that rests elsewhere is cast for each call.
_CASTING = {getattr(nn, name): getattr(_OPS, name) for name in ("Linear", "Conv2d", "GroupNorm", "LayerNorm")}
_CASTING |= {nn.Conv3d: _OPS.Conv3d, CogVideoXSafeConv3d: _SafeConv3d, nn.Embedding: _OPS.Embedding}


@dataclass(frozen=True)
class ComfyUI:
    """ComfyUI decides, as for its own models; see `mm_core.memory.Residence`."""

    policy: str = field(default="auto", compare=False)
    """auto, model: as core's models. none: not in part. group, sequential: in main memory as far as core can do it."""

    def device(self, kind: str) -> torch.device:
        own = {"text_encoder": management.text_encoder_device, "vae": management.vae_device}
        return own.get(kind, management.get_torch_device)()

    def dtype(self, kind: str, precision: str) -> torch.dtype:
        device = self.device(kind)
        if kind == "vae":
            return management.vae_dtype(device, [self.dtype("transformer", precision)])
        if kind == "text_encoder":
            # Without a flag core has fp16, also where the model computes in another type.
            asked = any(value for name, value in vars(args).items() if name.endswith("_text_enc"))
            dtype = management.text_encoder_dtype(device)
            return dtype if asked and dtype.itemsize > 1 else self.dtype("transformer", precision)
        check_precision(precision)
        if precision not in ("auto", *STORED):
            return compute_dtype(precision, device)
        dtype = management.unet_dtype(device, supported_dtypes=_TYPES)
        if dtype.itemsize == 1:  # a type to store in, by a flag of ComfyUI's command line
            dtype = management.unet_manual_cast(dtype, device, _TYPES)
        if precision == "fp8":
            check_fp8(device, dtype)
        return dtype

    def memory(self, kind: str) -> tuple[int, int]:
        device = self.device(kind)
        return management.get_free_memory(device), management.get_total_memory(device)

    def part(self, kind: str, modules: Sequence[nn.Module], together: Sequence[nn.Module] = ()) -> Part:
        if any(map(is_quantised, modules)):
            policy = self.policy if self.policy in ("group", "sequential") else "model"
            return _LentPart(Offloading(policy, self.device(kind)).part(kind, modules, together), modules)
        offload = {"text_encoder": management.text_encoder_offload_device, "vae": management.vae_offload_device}
        rest = offload.get(kind, management.unet_offload_device)()
        return ManagedPart(modules, self.device(kind), rest, self.policy if kind == "transformer" else "auto")

    def settled(self, choose: Callable[[int], str]) -> ComfyUI:
        return self


class _LentPart:
    """Weights of kinds that core cannot cast: on its device for their turn only, core making room for them."""

    def __init__(self, part: Part, modules: Sequence[nn.Module]) -> None:
        self.device, self.changing, self._part = part.device, part.changing, part
        self._size = sum(map(size_in_bytes, modules))

    @contextmanager
    def ready(self, beside: int = 0) -> Iterator[None]:
        management.free_memory(self._size + beside, self.device)
        with self._part.ready():
            yield


class MagicMirrorWeights(nn.ModuleList):
    """What core loads and unloads as one, under this name in its log."""


class ManagedPart:
    """Weights that core knows by a patcher; see `mm_core.memory.Part`."""

    def __init__(self, modules: Sequence[nn.Module], device: torch.device, rest: torch.device, policy: str) -> None:
        self.device, self._rest, self._policy = device, rest, policy
        self._weights = MagicMirrorWeights(modules)
        self._manage()

    def _manage(self) -> None:
        self._weights = MagicMirrorWeights(self._weights)  # core notes on it what of it is loaded
        with_cores_layers(self._weights)
        # Looked up now: core replaces this class as it starts, and an older one has no such name.
        patcher = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
        self.patcher = patcher(
            self._weights, load_device=self.device, offload_device=self._rest, size=size_in_bytes(self._weights)
        )

    @contextmanager
    def ready(self, beside: int = 0) -> Iterator[None]:
        if self._policy in ("group", "sequential"):
            beside = management.get_total_memory(self.device)
        management.load_models_gpu([self.patcher], memory_required=beside, force_full_load=self._policy == "none")
        for layer in self._weights.modules():
            if not hasattr(layer, "comfy_cast_weights"):  # small, and moved by core with the whole only
                for tensor in (*layer.parameters(recurse=False), *layer.buffers(recurse=False)):
                    tensor.data = tensor.data.to(self.device)
        yield

    @contextmanager
    def changing(self) -> Iterator[None]:
        for loaded in [item for item in management.current_loaded_models if item.model is self.patcher]:
            loaded.model_unload()
            management.current_loaded_models.remove(loaded)
        try:
            yield
        finally:
            self._manage()


def with_cores_layers(module: nn.Module, *, casting: bool = False) -> None:
    """Make layers core's, which compute with weights that rest elsewhere or are stored in 8 bits, with the
    same numbers.

    casting: also those weights that core has not in its charge.
    """
    for layer in module.modules():
        cls = _CASTING.get(type(layer))
        if cls is None:
            continue
        layer.__class__ = cls
        layer.bias = getattr(layer, "bias", None)
        # Stored in 8 bits: diffusers would replace the weight at each call, under core's pinned memory.
        stored = vars(layer).pop("_diffusers_hook", None) is not None
        if stored:
            del layer.forward
        if stored or casting:
            layer.comfy_cast_weights = True
