"""The adapter on ComfyUI's own CogVideoX: its model patcher, wrappers and sampling. For core with `comfy.ldm.cogvideo`.

Nothing of the model is changed for good: each adapted block's forward is an object patch of a clone, the adapter comes
along as an additional model, and a wrapper hands over the identity in each forward pass.
"""

from __future__ import annotations

import functools
import uuid
import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import comfy.ldm.cogvideo.model
import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import comfy.supported_models
import comfy.utils
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from .native_base import transformer_of

if TYPE_CHECKING:
    from ..mm_core.hosts.cogvideox_comfyui import ComfyCogVideoX
    from ..mm_core.models.adapter import MagicMirrorAdapter
    from ..mm_core.models.block import FaceState
    from ..mm_core.pipelines.control import Acting, AdapterSettings, Window
    from ..mm_core.pipelines.identity import Identity
    from ..mm_core.pipelines.magic_mirror import MagicMirror

ADDITIONAL = "magic_mirror"
_CONFIG = (
    "num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "flip_sin_to_cos", "freq_shift",
    "time_embed_dim", "text_embed_dim", "num_layers", "sample_width", "sample_height", "sample_frames", "patch_size",
    "patch_size_t", "temporal_compression_ratio", "max_text_seq_length", "spatial_interpolation_scale",
    "temporal_interpolation_scale", "use_rotary_positional_embeddings", "use_learned_positional_embeddings",
    "patch_bias",
)  # fmt: skip

_adapters: weakref.WeakKeyDictionary[MagicMirror, dict[torch.dtype, ModelPatcher]] = weakref.WeakKeyDictionary()


def core_model(mirror: MagicMirror) -> ModelPatcher:
    """The base model of a mirror as ComfyUI's own MODEL, from files with diffusers' key names, of any size.

    Raises CheckpointError for files that are not exactly its tensors, or hold values that are no numbers.
    """
    from ..mm_core.checkpoints.comfyui_keys import comfyui_key
    from ..mm_core.checkpoints.safetensors_file import check_weight
    from ..mm_core.pipelines.parts import check_transformer

    base = mirror.base
    check_transformer(base.transformer_config, base.transformer_files)
    weights = {}
    for path in base.transformer_files:
        for key, tensor in comfy.utils.load_torch_file(str(path)).items():
            check_weight(tensor, key, path)
            weights[comfyui_key(key)] = tensor
    config = {name: base.transformer_config[name] for name in _CONFIG if name in base.transformer_config}
    detected = comfy.supported_models.CogVideoX_T2V({"image_model": "cogvideox"} | config)
    detected.latent_format.scale_factor = base.vae_config["scaling_factor"]
    device = comfy.model_management.get_torch_device()
    offload = comfy.model_management.unet_offload_device()
    stored = comfy.model_management.unet_dtype(
        model_params=comfy.utils.calculate_parameters(weights),
        supported_dtypes=list(detected.supported_inference_dtypes),
        weight_dtype=comfy.utils.weight_dtype(weights),
    )
    computed = comfy.model_management.unet_manual_cast(stored, device, detected.supported_inference_dtypes)
    detected.set_inference_dtype(stored, computed)
    model = detected.get_model(weights, "")
    # Looked up now: core replaces this class as it starts.
    patcher = comfy.model_patcher.CoreModelPatcher(model, load_device=device, offload_device=offload)
    model.load_model_weights(weights, "", assign=patcher.is_dynamic())
    return patcher


def adapter_of(mirror: MagicMirror, dtype: torch.dtype) -> ModelPatcher:
    """The mirror's adapter for ComfyUI to load and offload: read once, shared by all models that it is put on."""
    from ..mm_core.checkpoints.adapter_file import load_adapter

    loaded = _adapters.setdefault(mirror, {})
    if dtype not in loaded:
        loaded[dtype] = ModelPatcher(
            load_adapter(mirror.adapter_path, dtype=dtype)[0],
            load_device=comfy.model_management.get_torch_device(),
            offload_device=comfy.model_management.unet_offload_device(),
        )
    return loaded[dtype]


@functools.cache
def host() -> ComfyCogVideoX:
    """The adapter's binding to core's blocks, with core's own attention and positions."""
    from ..mm_core.hosts.cogvideox_comfyui import ComfyCogVideoX

    return ComfyCogVideoX(
        attention=optimized_attention, timestep_embedding=comfy.ldm.cogvideo.model.get_timestep_embedding
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class NativeIdentity:
    """What the blocks and the prompt get; on the CPU."""

    id_embedding: Tensor
    """(1, P)."""
    face_tokens: Tensor | None
    """(1, Q, D)."""
    prompt: Tensor
    """(1, T, Dtxt), the person's word fused."""


@torch.no_grad()
def encode_native(
    adapter_patcher: ModelPatcher, identity: Identity, prompt: Tensor, slots: tuple[int, ...], settings: AdapterSettings
) -> NativeIdentity:
    """Run the parts of the adapter that depend on the person and the prompt only. prompt: (1, T, Dtxt)."""
    from ..mm_core.models.id_fusion import fuse_slots

    comfy.model_management.load_models_gpu([adapter_patcher])
    adapter: MagicMirrorAdapter = adapter_patcher.model
    device, dtype = adapter.id_proj.weight.device, adapter.id_proj.weight.dtype
    features = type(identity.features)(*(tensor.to(device, dtype) for tensor in identity.features))
    id_tokens = identity.id_tokens.to(device, dtype)
    if not settings.id_branch:
        id_tokens = torch.zeros_like(id_tokens)
    if slots:
        text = prompt.to(device, dtype)
        fused = adapter.id_fusion(text[:, slots, :], id_tokens)
        prompt = fuse_slots(text, fused, slots, settings.identity_scale).to(prompt.device, prompt.dtype)
    face = adapter.face_tokens(features, identity.weights).cpu() if settings.structure_branch else None
    return NativeIdentity(id_embedding=adapter.id_embedding(id_tokens).cpu(), face_tokens=face, prompt=prompt)


def with_identity(
    model: ModelPatcher, adapter_patcher: ModelPatcher, identity: NativeIdentity, settings: AdapterSettings
) -> ModelPatcher:
    """A clone of the model that makes this person; the model stays as it is."""
    transformer, adapter, binding = transformer_of(model), adapter_patcher.model, host()
    model = model.clone()
    key = f"{ADDITIONAL}.{uuid.uuid4()}"  # a later Apply finds no state of an earlier one
    for position, layer in enumerate(adapter.config.adapted_layers):
        name = f"diffusion_model.blocks.{layer}.forward"
        where = torch.tensor([position], device=model.load_device)
        block, adapter_block = transformer.blocks[layer], adapter.blocks[str(layer)]
        forward = binding.adapted_forward(block, adapter_block, where, model.get_model_object(name), key)
        model.add_object_patch(name, forward)
    model.set_additional_models(ADDITIONAL, [adapter_patcher])
    sampling = model.get_model_object("model_sampling")
    wrapper = _Identity(
        key=key,
        host=binding,
        adapter=adapter,
        identity=identity,
        settings=settings,
        sigmas={window: tuple(map(sampling.percent_to_sigma, window)) for window in settings.windows},
    )
    kind = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
    model.remove_wrappers_with_key(kind, ADDITIONAL)
    model.add_wrapper_with_key(kind, ADDITIONAL, wrapper)
    return model


@dataclass(frozen=True, kw_only=True, eq=False)
class _Identity:
    """Around the transformer: puts the rows that carry the identity last, and hands over the state."""

    key: str
    host: ComfyCogVideoX
    adapter: MagicMirrorAdapter
    identity: NativeIdentity
    settings: AdapterSettings
    sigmas: dict[Window, tuple[float, float]]
    """The noise levels between which each window lies, from the larger."""
    copies: dict[tuple[int, torch.device, torch.dtype], Tensor] = field(default_factory=dict)
    """Of the identity's tensors, less than a megabyte, where a step wants them."""

    def __call__(
        self,
        executor: Any,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        ofs: Tensor | None = None,
        transformer_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        options = dict(transformer_options or {})
        acting, halves = self._acting(options), options["cond_or_uncond"]
        carry = [number for number, half in enumerate(halves) if half == 0 or self.settings.in_negative]
        if not carry or not acting.in_blocks:
            return executor(x, timestep, context, ofs, options, **kwargs)
        order = [number for number in range(len(halves)) if number not in carry] + carry
        ofs = _halves(ofs, order) if ofs is not None and len(ofs) == len(x) else ofs
        x, timestep, context = (_halves(tensor, order) for tensor in (x, timestep, context))
        rows = len(x) // len(halves) * len(carry)
        options[self.key] = self._state(acting, executor.class_obj, timestep[-rows:], x)
        result = executor(x, timestep, context, ofs, options, **kwargs)
        return _halves(result, [order.index(number) for number in range(len(halves))])

    def _acting(self, options: dict[str, Any]) -> Acting:
        if set(self.sigmas) == {(0.0, 1.0)}:  # at every step: the noise level need not be read from the device
            return self.settings.acting(lambda window: True)
        sigma = float(options["sigmas"].max())

        def inside(window: Window) -> bool:
            first, last = self.sigmas[window]
            return last < sigma <= first

        return self.settings.acting(inside)

    def _state(self, acting: Acting, transformer: Any, timestep: Tensor, x: Tensor) -> FaceState:
        from ..mm_core.pipelines.conditioning import ablate

        def spread(tensor: Tensor) -> Tensor:
            key = id(tensor), x.device, x.dtype
            if key not in self.copies:
                self.copies[key] = tensor.to(x.device, x.dtype)
            return self.copies[key].expand(len(timestep), *tensor.shape[1:])

        state = self.host.face_state(
            transformer,
            self.adapter,
            id_embedding=spread(self.identity.id_embedding),
            face_tokens=spread(self.identity.face_tokens) if acting.face else None,
            timestep=timestep,
            can_scale=acting.can_scale,
            ip_scale=self.settings.ip_scale,
        )
        state.factors = ablate(state.factors, self.settings)
        return state
def _halves(batch: Tensor, order: list[int]) -> Tensor:
    """The equal parts of a batch, positive and negative prompts', in another order; without indices on the device."""
    parts = batch.chunk(len(order))
    return batch if order == sorted(order) else torch.cat([parts[number] for number in order])


