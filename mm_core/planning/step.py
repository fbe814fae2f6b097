"""A training step at full size on the `meta` device: shapes, arithmetic, bytes, in seconds and without memory.

The models are the real classes, the step is the one that trains; only the face recogniser, which reads values, is
left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import T5EncoderModel

from ..checkpoints.photomaker import read_id_encoder_config
from ..choices import TINY
from ..counting import Counter, GpuKernels
from ..errors import SettingError
from ..memory import store_in_fp8
from ..models.adapter import MagicMirrorAdapter
from ..models.id_encoder import PHOTOMAKER_V2, IDEncoder, IDEncoderConfig
from ..pipelines import tiny
from ..pipelines.control import AdapterSettings
from ..pipelines.named import configs_of
from ..pipelines.presets import ClipLimits, latent_shape
from ..training.config import ABLATIONS, SamplingConfig, StageConfig, TrainingConfig, adapter_config
from ..training.sample_losses import IdentityLoss, NoiseLoss, Pass
from ..training.step import AdapterTraining

_META = torch.device("meta")
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


def build_models(config: TrainingConfig, dtype: torch.dtype) -> Models:
    """The models that a config names, the adapter attached. dtype: of the frozen ones.

    Raises:
        SettingError: an unknown base, or an adapter with unknown sizes or sizes that are not the base's.
        CheckpointError: a folder that is no CogVideoX text-to-video model.
    """
    name, transformer, vae, text = configs_of(config.base)
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
        nn.Module.to(module, dtype).requires_grad_(False).eval()
    if config.fp8_base:
        store_in_fp8(models.transformer, None, dtype)
    return models


def id_encoder_sizes(config: TrainingConfig) -> IDEncoderConfig:
    """The sizes that the config's file names; a plan may come before the file: then the base's own."""
    path = None if config.id_encoder is None else Path(config.id_encoder).expanduser()
    if path is not None and path.is_file():
        return read_id_encoder_config(path)
    return tiny.ID_ENCODER if config.base == TINY else PHOTOMAKER_V2


@dataclass(frozen=True, kw_only=True)
class Counted:
    """A micro-batch forward and back."""

    forward: int
    """FLOPs up to the prediction."""
    identity: int
    """FLOPs of the identity loss, forward and back; 0: it is off."""
    backward: int
    """FLOPs of the way back from there, with what checkpointing runs again."""
    sampled: int
    """FLOPs of the predictions for clips that the model samples itself, and back."""
    kept: int
    """Bytes that are alive after the last prediction: activations, autocast's copies of weights, the batch."""
    decoding: int
    """The most that the identity loss has beside those, forward and back."""
    peak: int
    """The most that is alive at once."""


class DryStep:
    """A step of samples that all carry the identity, from tensors that hold nothing.

    The sampled clips of `sampling` stay as they are.

    Raises SettingError for a clip that the base cannot make.
    """

    def __init__(self, models: Models, config: TrainingConfig, stage: StageConfig) -> None:
        models.limits.check(width=config.width, height=config.height, num_frames=stage.frames)
        self.models, self.stage = models, stage
        self.height, self.width = config.height, config.width
        base = models.transformer.config
        patch_t = base.patch_size_t or 1
        _, frames, rows, columns = latent_shape(
            models.vae.config, frames=stage.frames, height=config.height, width=config.width
        )
        frames += -frames % patch_t  # 1.5 pads to whole patches
        self.latent_shape = (frames, base.in_channels, rows, columns)
        self.video_tokens = frames // patch_t * (rows // base.patch_size) * (columns // base.patch_size)
        self.kernels = GpuKernels(None if stage.loop.precision == "no" else stage.loop.dtype)
        decoded = _Decoded(models.vae, frames, (self.height, self.width), self.kernels)
        judged = [decoded] if stage.identity_weight else []
        sampled = stage.sampling is not None
        models.training.losses = [NoiseLoss(), *([] if sampled else judged)]
        models.training.sampled_losses = judged if sampled else []
        models.training.rollouts = _Still(stage.sampling) if sampled else None

    def count(self, samples: int, checkpointing: bool) -> Counted:
        """Forward and back. Gradients are there already, as they are from the second micro-batch on."""
        models, self.kernels.copies = self.models, {}
        for model, dtype in ((models.transformer, self.kernels.dtype), (models.vae, None)):
            model.disable_gradient_checkpointing()
            if checkpointing:
                model.enable_gradient_checkpointing(partial(_checkpoint, dtype))
        for parameter in models.adapter.parameters():
            parameter.grad = torch.empty_like(parameter)
        ahead: list[tuple[int, int, int]] = []
        back: list[tuple[int, int, int]] = []

        def mark(marks: list[tuple[int, int, int]]) -> None:
            marks.append((counter.flops, counter.alive, counter.peak))
            counter.peak = counter.alive

        def predicted(module: nn.Module, inputs: Any, output: tuple[Tensor]) -> None:
            if output[0].requires_grad:
                mark(ahead)
                output[0].register_hook(lambda gradient: mark(back))

        hook = models.transformer.register_forward_hook(predicted)
        with Counter(models.transformer.parameters()) as counter, self.kernels:
            loss = self.loss(samples)
            self.kernels.copies = WeakValueDictionary()  # autocast keeps its copies to the end of the forward pass
            loss.backward()
            mark(back)
        hook.remove()
        # Backwards, the sampled clips' predictions come first.
        (forward, *_), (predicted_all, kept, _), (judged, _, decoding) = ahead[0], ahead[-1], back[0]
        return Counted(
            forward=forward,
            identity=judged - predicted_all,
            backward=back[-1][0] - back[-2][0],
            sampled=predicted_all - forward + back[-2][0] - judged,
            kept=kept,
            decoding=decoding - kept if self.stage.identity_weight else 0,
            peak=max(peak for *_, peak in (*ahead, *back)),
        )

    def loss(self, samples: int) -> Tensor:
        """(), from the cached features on. Raises SettingError for sizes that do not fit each other."""
        try:
            batch = self._batch(samples)
            if self.stage.sampling is not None:
                numbers = list(range(samples))
                batch["rollout"] = self._batch(samples) | {"numbers": numbers, "negative": batch["text"][:1]}
            return self.models.training(batch)["loss"].mean()
        except (RuntimeError, ValueError) as error:  # torch's and diffusers' way of saying that shapes differ
            raise SettingError(
                f"A step of {self.stage.frames} frame(s) of {self.width} x {self.height} px does not fit "
                f"{self.models.name} and its adapter: {error}"
            ) from error

    def _batch(self, samples: int) -> dict[str, Any]:
        """As `AdapterTraining` takes it. No face mask: the loss reads its values, and `meta` has none."""
        models, vision = self.models, self.models.id_encoder.config
        perceiver = models.id_encoder.qformer_perceiver
        id_dim = perceiver.token_norm.normalized_shape[0]
        num_ids = perceiver.token_proj[-1].out_features // id_dim
        image_tokens = (vision.image_size // vision.patch_size) ** 2 + 1
        references, base = self.stage.max_references, models.transformer.config
        with _META:
            batch = {name: torch.empty(samples, *self.latent_shape) for name in ("clean", "noise", "noisy")}
            batch |= {
                "timestep": torch.empty(samples),
                "alpha_bar": torch.full((samples,), _ALPHA_BAR, device="cpu"),
                "text": torch.empty(samples, base.max_text_seq_length, models.text_encoder.config.d_model),
                "slots": torch.arange(num_ids).expand(samples, -1),
                "has_text": torch.ones(samples, dtype=torch.bool),
                "id_tokens": torch.empty(samples, references, num_ids, id_dim),
                "structure_tokens": torch.empty(samples, references, image_tokens, vision.hidden_size),
            }
            if base.use_rotary_positional_embeddings:
                batch |= {name: torch.empty(self.video_tokens, base.attention_head_dim) for name in ("cos", "sin")}
        return batch


class _Decoded(IdentityLoss):
    """The identity loss up to the pixels, whose mean stands for the face recogniser. The last frame is judged."""

    def __init__(
        self, vae: AutoencoderKLCogVideoX, frames: int, size: tuple[int, int], kernels: GpuKernels
    ) -> None:
        super().__init__(1.0, vae, nn.Identity())
        self.last, self.size, self.kernels = frames - 1, size, kernels

    def __call__(self, passed: Pass) -> tuple[Tensor, Tensor]:
        clean, dtype = passed.clean, self.kernels.dtype
        self.kernels.dtype = None  # autocast is off here
        frames = self.frames(clean, torch.full((len(clean),), self.last))
        self.kernels.dtype = dtype
        if frames.shape[1:] != (3, *self.size):
            raise ValueError(f"the VAE decodes {tuple(frames.shape[1:])}, not (3, {self.size[0]}, {self.size[1]})")
        return torch.arange(len(clean), device=clean.device), frames.flatten(1).mean(dim=1)


class _Still:
    """`Rollouts` that read no values."""

    def __init__(self, config: SamplingConfig) -> None:
        self.config = config

    def latents(self, numbers: Sequence[int], begun: Tensor) -> Tensor:
        return begun

    def advance(self, numbers: Sequence[int], predictions: Tensor, latents: Tensor) -> None: ...


def _checkpoint(dtype: torch.dtype | None, module: nn.Module, *args: Any) -> Any:
    """As diffusers checkpoints; what runs again does so as on a GPU, and keeps no copies of weights."""
    return checkpoint(module, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), GpuKernels(dtype)))
