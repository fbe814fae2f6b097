"""A training step at full size on the `meta` device: shapes, arithmetic, saved tensors, in seconds and without memory.

The models are the real classes, the step is the one that trains; only the face recogniser, which reads values, is
left out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import T5Config, T5EncoderModel

from ..checkpoints.photomaker import read_id_encoder_config
from ..errors import SettingError
from ..hosts.cogvideox_diffusers import STATE
from ..models.adapter import MagicMirrorAdapter
from ..models.id_encoder import PHOTOMAKER_V2, IDEncoder, IDEncoderConfig
from ..pipelines import tiny
from ..pipelines.base import FolderBase, TinyBase
from ..pipelines.control import AdapterSettings
from ..pipelines.presets import PRESETS, T5_XXL, ClipLimits, published
from ..training.config import ABLATIONS, StageConfig, TrainingConfig, adapter_config
from ..training.losses import TEMPORAL_COMPRESSION, predict_clean
from ..training.sample_losses import BEHIND, NoiseLoss, decode_frame
from ..training.step import AdapterTraining

_META = torch.device("meta")
_DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_ALPHA_BAR = 0.5
"""Any; the loss checks its value, so it cannot be on `meta`."""


@dataclass(frozen=True, kw_only=True)
class Models:
    """Everything a run has to do with, on `meta`, the frozen models in the dtype of the run."""

    name: str
    transformer: CogVideoXTransformer3DModel
    vae: AutoencoderKLCogVideoX
    text_encoder: T5EncoderModel
    id_encoder: IDEncoder
    adapter: MagicMirrorAdapter
    training: AdapterTraining
    """The step, with the two of them."""
    limits: ClipLimits


def build_models(config: TrainingConfig, precision: str) -> Models:
    """The models that a config names, the adapter attached.

    Raises:
        SettingError: an unknown base, or an adapter with unknown sizes or sizes that are not the base's.
        CheckpointError: a folder that is no CogVideoX text-to-video model.
    """
    name, transformer, vae, text = base_configs(config.base)
    id_encoder = id_encoder_sizes(config)
    try:
        sizes = adapter_config(config, name, transformer)
        with _META:
            adapted = CogVideoXTransformer3DModel.from_config(dict(transformer))
            adapter = MagicMirrorAdapter(sizes)
            models = Models(
                name=name,
                transformer=adapted,
                vae=AutoencoderKLCogVideoX.from_config(dict(vae)),
                text_encoder=T5EncoderModel(text),
                id_encoder=IDEncoder(id_encoder),
                adapter=adapter,
                training=AdapterTraining(
                    adapted, adapter, AdapterSettings(**ABLATIONS[config.ablation]), [NoiseLoss()]
                ),
                limits=ClipLimits.from_config(transformer, vae),
            )
    except (TypeError, ValueError) as error:  # the dataclass's and the front end's own words
        raise SettingError(f"The adapter sizes {dict(config.adapter)} do not fit {name}: {error}.") from error
    for module in (models.transformer, models.vae, models.text_encoder, models.id_encoder):
        nn.Module.to(module, _DTYPES[precision]).requires_grad_(False).eval()
    return models


def base_configs(base: str) -> tuple[str, Mapping[str, Any], Mapping[str, Any], T5Config]:
    """Name, transformer, VAE and T5 of a base: `tiny`, a published name, or a folder."""
    preset = published(base)
    if preset is not None:
        config = {"patch_size_t": None} | dict(preset.transformer)
        return preset.repo, config, preset.vae, T5Config(**T5_XXL)
    folder = TinyBase().folder if base == tiny.NAME else Path(base).expanduser()
    if not folder.is_dir():
        raise SettingError(f"base is {base}; it must be tiny, one of {', '.join(PRESETS)}, or the folder of a model.")
    model = FolderBase(folder)
    name = base if base == tiny.NAME else folder.name
    return name, model.transformer_config, model.vae_config, T5Config(**model.text_config)


def id_encoder_sizes(config: TrainingConfig) -> IDEncoderConfig:
    """The sizes that the config's file names; a plan may come before the file: then the base's own."""
    path = None if config.id_encoder is None else Path(config.id_encoder).expanduser()
    if path is not None and path.is_file():
        return read_id_encoder_config(path)
    return tiny.ID_ENCODER if config.base == tiny.NAME else PHOTOMAKER_V2


def dry_run(config: TrainingConfig, stage: str) -> None:
    """Pass every shape of a stage, `image` or `video`, through one step's forward and loss, at full size.

    Raises SettingError for a size that does not fit, CheckpointError for a folder that is no base model.
    """
    settings = config.stage(stage)
    models = build_models(config, settings.loop.precision)
    step = DryStep(models, config, settings)
    with step.fitting(), MetaKernels(settings.loop.precision), torch.no_grad():
        step.noise_loss()
        step.decode(step.predicted_clean())


class DryStep:
    """One step with one sample that carries the identity, from tensors that hold nothing, wherever the models are.

    Raises SettingError for a clip that the base cannot make.
    """

    def __init__(self, models: Models, config: TrainingConfig, stage: StageConfig) -> None:
        models.limits.check(width=config.width, height=config.height, num_frames=stage.frames)
        self.models, self.stage = models, stage
        self.device = models.transformer.device
        self.height, self.width = config.height, config.width
        self.dtype = _DTYPES[stage.loop.precision]
        base = models.transformer.config
        patch_t = base.patch_size_t or 1
        frames = (stage.frames - 1) // TEMPORAL_COMPRESSION + 1
        frames += -frames % patch_t  # 1.5 pads to whole patches
        cell = 2 ** (len(models.vae.config.block_out_channels) - 1)  # pixels of a latent
        rows, columns = config.height // cell, config.width // cell
        self.latent_shape = (1, frames, base.in_channels, rows, columns)
        self.video_tokens = frames // patch_t * (rows // base.patch_size) * (columns // base.patch_size)

    @contextmanager
    def fitting(self) -> Iterator[None]:
        """Sizes that do not fit each other become a SettingError."""
        try:
            yield
        except (RuntimeError, ValueError) as error:  # torch's and diffusers' way of saying that shapes differ
            raise SettingError(
                f"A step of {self.stage.frames} frame(s) of {self.width} x {self.height} px does not fit "
                f"{self.models.name} and its adapter: {error}"
            ) from error

    def noise_loss(self) -> Tensor:
        """() the noise loss, from the cached features on."""
        return self.models.training(self.batch())["loss"].mean()

    def batch(self) -> dict[str, Tensor]:
        """A sample as `AdapterTraining` takes it. No face mask: the loss reads its values, and `meta` has none."""
        models, vision = self.models, self.models.id_encoder.config
        perceiver = models.id_encoder.qformer_perceiver
        id_dim = perceiver.token_norm.normalized_shape[0]
        num_ids = perceiver.token_proj[-1].out_features // id_dim
        image_tokens = (vision.image_size // vision.patch_size) ** 2 + 1
        references, base = self.stage.max_references, models.transformer.config
        batch = {name: self._empty(*self.latent_shape) for name in ("clean", "noise", "noisy")}
        batch |= {
            "timestep": torch.empty(1, device=self.device),
            "alpha_bar": torch.tensor([_ALPHA_BAR]),
            "text": self._empty(1, base.max_text_seq_length, models.text_encoder.config.d_model),
            "slots": torch.arange(num_ids, device=self.device)[None],
            "has_text": torch.ones(1, dtype=torch.bool, device=self.device),
            "id_tokens": self._empty(1, references, num_ids, id_dim),
            "structure_tokens": self._empty(1, references, image_tokens, vision.hidden_size),
        }
        if base.use_rotary_positional_embeddings:
            shape = (self.video_tokens, base.attention_head_dim)
            batch |= {name: torch.empty(shape, device=self.device) for name in ("cos", "sin")}
        return batch

    def predicted_clean(self) -> Tensor:
        """x0: (1, F, C, h, w)."""
        prediction, noisy = self._empty(*self.latent_shape), self._empty(*self.latent_shape)
        return predict_clean(prediction, noisy, torch.tensor([_ALPHA_BAR]))

    def decode(self, clean: Tensor) -> Tensor:
        """The identity loss up to the pixels, whose mean stands for the face recogniser: (1, F, C, h, w) -> ()."""
        frame = decode_frame(self.models.vae, clean[:, -1 - BEHIND :])  # (1, 3, H, W)
        if frame.shape != (1, 3, self.height, self.width):
            raise ValueError(f"the VAE decodes {tuple(frame.shape)}, not (1, 3, {self.height}, {self.width})")
        return frame.mean()

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)


_LOW_PRECISION = {F.linear, torch.matmul, torch.bmm, F.conv2d, F.conv3d, torch.conv2d, torch.conv3d}
_FULL_PRECISION = {F.layer_norm, F.group_norm, F.interpolate}


class MetaKernels(TorchFunctionMode):
    """What a GPU does and `meta` does not: flash attention, and autocast's casts of the layers that are used here.

    Without it attention would be counted as if its (S, S) matrix were written, and mixed precision not at all.
    """

    def __init__(self, precision: str) -> None:
        super().__init__()
        self.dtype = None if precision == "no" else _DTYPES[precision]
        self.copies: dict[int, Tensor] = {}
        """Low-precision copies of trained weights; autocast keeps them until the end of the forward pass."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        attention = function is F.scaled_dot_product_attention
        if self.dtype is not None and (attention or function in _LOW_PRECISION):
            args, kwargs = self._cast(args, kwargs, self.dtype)
        elif self.dtype is not None and function in _FULL_PRECISION:
            args, kwargs = self._cast(args, kwargs, torch.float32)
        if attention:
            named = dict(zip(("query", "key", "value"), args)) | kwargs
            if named.get("attn_mask") is not None:
                return function(*args, **kwargs)
            tensors = (named[name] for name in ("query", "key", "value"))
            return torch.ops.aten._scaled_dot_product_flash_attention(*tensors)[0]
        return function(*args, **kwargs)

    def _cast(self, args: tuple, kwargs: dict, dtype: torch.dtype) -> tuple[tuple, dict]:
        def cast(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == dtype:
                return value
            if isinstance(value, nn.Parameter) and value.requires_grad and dtype == self.dtype:
                return self.copies.setdefault(id(value), value.to(dtype))
            return value.to(dtype)

        return tuple(map(cast, args)), {name: cast(value) for name, value in kwargs.items()}


@dataclass(frozen=True, kw_only=True)
class Work:
    """A pass forward and back."""

    forward: int
    """FLOPs; a multiplication and an addition are two."""
    backward: int
    saved: int
    """Bytes that the forward pass keeps for the backward pass, each storage once, weights left out."""
    saved_checkpointed: int
    """The same where each block keeps its inputs and runs again: one block at a time is whole."""
    weight_copies: int
    """Bytes of autocast's copies of trained weights."""


def measure(
    forward: Callable[[], Tensor], weights: Iterable[Tensor], blocks: Iterable[nn.Module], precision: str
) -> Work:
    """Run a forward pass on `meta`, and its backward pass. blocks: what gradient checkpointing would run again."""
    kernels = MetaKernels(precision)
    saved = SavedTensors(weights, blocks)
    with FlopCounterMode(display=False) as counter, kernels:
        with saved.recording():
            loss = forward()
        ahead = counter.get_total_flops()
        loss.backward()
    copies = {copy.untyped_storage()._cdata: copy.untyped_storage().nbytes() for copy in kernels.copies.values()}
    total, checkpointed = saved.bytes(without=copies.keys())
    return Work(
        forward=ahead,
        backward=counter.get_total_flops() - ahead,
        saved=total,
        saved_checkpointed=checkpointed,
        weight_copies=sum(copies.values()),
    )


class SavedTensors:
    """What autograd keeps of a forward pass, on any device. Blocks may lie within others: checkpoints nest."""

    def __init__(self, weights: Iterable[Tensor], blocks: Iterable[nn.Module]) -> None:
        self._weights = {weight.untyped_storage()._cdata for weight in weights}
        self._blocks = list(blocks)
        self._path: tuple[int, ...] = ()  # numbers of the running blocks, from the outermost in
        self._storages: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used twice
        self._saved: defaultdict[tuple[int, ...], set[int]] = defaultdict(set)
        self._inputs: defaultdict[tuple[int, ...], set[int]] = defaultdict(set)  # of the blocks within

    @contextmanager
    def recording(self) -> Iterator[None]:
        with ExitStack() as stack:
            for number, block in enumerate(self._blocks):
                before = block.register_forward_pre_hook(self._enter(number), with_kwargs=True)
                after = block.register_forward_hook(self._leave)
                stack.callback(before.remove)
                stack.callback(after.remove)
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor))
            yield

    def bytes(self, without: Iterable[int] = ()) -> tuple[int, int]:
        """All that is saved, and what is left of it under gradient checkpointing; without some storages."""
        weights = self._weights | set(without)
        everything = set().union(*self._saved.values()) - weights
        return self._size(everything), self._at_once((), weights)

    def _at_once(self, path: tuple[int, ...], there: set[int]) -> int:
        """Where each block within a part keeps its inputs and runs again, one at a time. there: kept around it."""
        own = (self._saved[path] | self._inputs[path]) - there
        within = {found[: len(path) + 1] for found in list(self._saved) if found[: len(path)] == path != found}
        return self._size(own) + max((self._at_once(block, there | own) for block in within), default=0)

    def _size(self, keys: set[int]) -> int:
        return sum(self._storages[key].nbytes() for key in keys)

    def _key(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        self._storages[storage._cdata] = storage
        return storage._cdata

    def _pack(self, tensor: Tensor) -> Tensor:
        self._saved[self._path].add(self._key(tensor))
        return tensor

    def _enter(self, number: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            state = (kwargs.get("attention_kwargs") or {}).get(STATE)
            carried = [] if state is None else [*state.factors, state.streams, state.ip_scale]
            found = [*args, *kwargs.values(), *carried]
            self._inputs[self._path] |= {self._key(value) for value in found if isinstance(value, Tensor)}
            self._path += (number,)

        return hook

    def _leave(self, *_: Any) -> None:
        self._path = self._path[:-1]
