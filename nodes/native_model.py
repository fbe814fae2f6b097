"""The adapter on ComfyUI's own CogVideoX: its model patcher, wrappers and sampling. For core with `comfy.ldm.cogvideo`.

Nothing of the model is changed for good: each adapted block's forward is an object patch of a clone, what every step
needs of the adapter comes along as an additional model, and wrappers hand over the identity in each forward pass.
"""

from __future__ import annotations

import functools
import uuid
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
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
from torch import Tensor, nn

from ..mm_core.errors import OutOfMemoryError
from ..mm_core.out_of_memory import out_of_memory_as
from .native_base import transformer_of
from .native_factors import Factors

if TYPE_CHECKING:
    from comfy.model_base import BaseModel

    from ..mm_core.hosts.cogvideox_comfyui import ComfyCogVideoX, Place
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

_adapters: weakref.WeakKeyDictionary[MagicMirror, dict[torch.dtype, NativeAdapter]] = weakref.WeakKeyDictionary()


class FaceAttention(nn.ModuleList):
    """The layers of the adapter that every step runs, under a name to be read in core's log."""


@dataclass(frozen=True, kw_only=True, eq=False)
class NativeAdapter:
    """An adapter that rests in main memory, all of its layers of a class that brings the weights to where it computes.

    So everything that is done before the first step visits the device layer by layer.
    """

    adapter: MagicMirrorAdapter
    patcher: ModelPatcher
    """Of its `FaceAttention`, for core to load, in part if need be, beside the model."""


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


def adapter_of(mirror: MagicMirror, dtype: torch.dtype) -> NativeAdapter:
    """The mirror's adapter, read once, shared by all models that it is put on."""
    from ..mm_core.checkpoints.adapter_file import load_adapter
    from ..mm_core.memory import sampling_parts
    from .runtime_memory import with_cores_layers

    loaded = _adapters.setdefault(mirror, {})
    if dtype not in loaded:
        adapter = load_adapter(mirror.adapter_path, dtype=dtype)[0]
        with_cores_layers(adapter, casting=True)
        # Looked up now: core replaces this class as it starts.
        patcher = comfy.model_patcher.CoreModelPatcher(
            FaceAttention(sampling_parts(adapter)),
            load_device=comfy.model_management.get_torch_device(),
            offload_device=comfy.model_management.unet_offload_device(),
        )
        loaded[dtype] = NativeAdapter(adapter=adapter, patcher=patcher)
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
    adapter: MagicMirrorAdapter, identity: Identity, prompt: Tensor, slots: tuple[int, ...], settings: AdapterSettings
) -> NativeIdentity:
    """Run the parts of the adapter that depend on the person and the prompt only. prompt: (1, T, Dtxt)."""
    from ..mm_core.models.id_fusion import fuse_slots

    device, dtype = comfy.model_management.get_torch_device(), adapter.id_proj.weight.dtype
    comfy.model_management.free_memory(comfy.model_management.minimum_inference_memory(), device)
    with out_of_memory_as(_does_not_fit):
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
    model: ModelPatcher, native: NativeAdapter, identity: NativeIdentity, settings: AdapterSettings
) -> ModelPatcher:
    """A clone of the model that makes this person; the model stays as it is."""
    from ..mm_core.hosts.cogvideox_comfyui import Place

    transformer, adapter, binding = transformer_of(model), native.adapter, host()
    model = model.clone()
    key = f"{ADDITIONAL}.{uuid.uuid4()}"  # a later Apply finds no state of an earlier one
    places = [Place() for _ in adapter.config.adapted_layers]
    for place, layer in zip(places, adapter.config.adapted_layers):
        name = f"diffusion_model.blocks.{layer}.forward"
        block, adapter_block = transformer.blocks[layer], adapter.blocks[str(layer)]
        forward = binding.adapted_forward(block, adapter_block, place, model.get_model_object(name), key)
        model.add_object_patch(name, forward)
    model.set_additional_models(ADDITIONAL, [native.patcher])
    sampling = model.get_model_object("model_sampling")
    wrapper = _Identity(
        key=key,
        places=places,
        adapter=adapter,
        identity=identity,
        settings=settings,
        sigmas={window: tuple(map(sampling.percent_to_sigma, window)) for window in settings.windows},
    )
    kinds = comfy.patcher_extension.WrappersMP
    for kind, around in ((kinds.PREDICT_NOISE, wrapper.step), (kinds.DIFFUSION_MODEL, wrapper.forward)):
        model.remove_wrappers_with_key(kind, ADDITIONAL)
        model.add_wrapper_with_key(kind, ADDITIONAL, around)
    return model


@dataclass(frozen=True, kw_only=True, eq=False)
class _Run:
    """What is made for a run and goes with it: core keeps it in the options that the run has for itself."""

    factors: Factors
    face_tokens: Tensor | None
    """(1, Q, D), on the device."""
    ip_scale: Tensor
    """(), on the device."""
    positions: Sequence[Tensor]
    """For each place."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Step:
    """The identity at one noise level, for both halves of guidance and every window of the clip; on the device."""

    run: _Run
    acting: Acting
    packed: Tensor

    def state(self, rows: int) -> FaceState:
        from ..mm_core.models.block import FaceState

        face = self.run.face_tokens if self.acting.face else None
        scales = dict(can_scale=self.acting.can_scale, ip_scale=self.run.ip_scale)
        return FaceState.of_step(self.packed, face, rows=rows, **scales)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Identity:
    """What core calls around each step, and around the transformer in it. Nothing of a run stays here."""

    key: str
    """Of the step in core's options, then of the state that the blocks find there."""
    places: Sequence[Place]
    adapter: MagicMirrorAdapter
    identity: NativeIdentity
    settings: AdapterSettings
    sigmas: dict[Window, tuple[float, float]]
    """The noise levels between which each window lies, from the larger."""

    def step(self, executor: Any, x: Tensor, timestep: Tensor, model_options: dict[str, Any], seed: Any) -> Tensor:
        """Around all that is computed at one noise level. timestep: (B,) noise levels, which are the same."""
        options = model_options["transformer_options"]  # the run's own, the same at every step
        sigma = float(timestep[0])
        acting = self._acting(sigma)
        with out_of_memory_as(_does_not_fit):
            if acting.in_blocks:
                if ADDITIONAL not in options:
                    options[ADDITIONAL] = self._run(executor.class_obj.inner_model, options["sample_sigmas"], x.device)
                run: _Run = options[ADDITIONAL]
                options[self.key] = _Step(run=run, acting=acting, packed=run.factors.at(sigma))
                self._tell(run.positions)
            try:
                return executor(x, timestep, model_options, seed)
            finally:
                options.pop(self.key, None)
                self._tell([None] * len(self.places))

    def forward(
        self,
        executor: Any,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        ofs: Tensor | None = None,
        transformer_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Around the transformer: puts the rows that carry the identity last, and hands over the state."""
        options = dict(transformer_options or {})
        step: _Step | None = options.pop(self.key, None)
        halves = options["cond_or_uncond"]
        carry = [number for number, half in enumerate(halves) if half == 0 or self.settings.in_negative]
        if not carry or step is None:
            return executor(x, timestep, context, ofs, options, **kwargs)
        order = [number for number in range(len(halves)) if number not in carry] + carry
        ofs = _halves(ofs, order) if ofs is not None and len(ofs) == len(x) else ofs
        x, timestep, context = (_halves(tensor, order) for tensor in (x, timestep, context))
        options[self.key] = step.state(rows=len(x) // len(halves) * len(carry))
        result = executor(x, timestep, context, ofs, options, **kwargs)
        return _halves(result, [order.index(number) for number in range(len(halves))])

    def _tell(self, positions: Sequence[Tensor | None]) -> None:
        for place, position in zip(self.places, positions):
            place.position = position

    def _acting(self, sigma: float) -> Acting:
        def inside(window: Window) -> bool:
            first, last = self.sigmas[window]
            return last < sigma <= first

        return self.settings.acting(inside)

    def _run(self, model: BaseModel, schedule: Tensor, device: torch.device) -> _Run:
        """model: loaded, as it samples. schedule: (steps + 1,) noise levels."""
        dtype, face = model.get_dtype_inference(), self.identity.face_tokens
        return _Run(
            factors=Factors(
                model,
                host(),
                self.adapter,
                self.identity.id_embedding.to(device, dtype),
                self.settings,
                [sigma for sigma in schedule.tolist() if self._acting(sigma).in_blocks],
            ),
            face_tokens=None if face is None else face.to(device, dtype),
            ip_scale=torch.full((), self.settings.ip_scale, device=device, dtype=dtype),
            positions=torch.arange(len(self.places), device=device).split(1),
        )


def _halves(batch: Tensor, order: list[int]) -> Tensor:
    """The equal parts of a batch, positive and negative prompts', in another order; without indices on the device."""
    parts = batch.chunk(len(order))
    return batch if order == sorted(order) else torch.cat([parts[number] for number in order])


class _DoesNotFit(OutOfMemoryError, torch.OutOfMemoryError):
    """Core unloads all models at what is torch's error too."""


def _does_not_fit(reason: str) -> OutOfMemoryError:
    return _DoesNotFit(
        "There is not enough memory on the device to make this clip. Start ComfyUI with --lowvram or --novram, make "
        f"the clip shorter or smaller, or close what else uses the device. ({reason})"
    )
