"""A training step at full size on the `meta` device: shapes, arithmetic, saved tensors, in seconds and without memory.

The models are the real classes, the step is the one that trains; only the face recogniser, which reads values, is
left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel

from ..checkpoints.photomaker import read_id_encoder_config
from ..counting import GpuKernels
from ..errors import SettingError
from ..memory import store_in_fp8
from ..models.adapter import MagicMirrorAdapter
from ..models.id_encoder import PHOTOMAKER_V2, IDEncoder, IDEncoderConfig
from ..pipelines import tiny
from ..pipelines.base import FolderBase, TinyBase
from ..pipelines.control import AdapterSettings
from ..pipelines.presets import PRESETS, T5_XXL, ClipLimits, published
from ..training.config import ABLATIONS, StageConfig, TrainingConfig, adapter_config
from ..training.diffusion import predict_clean
from ..training.losses import TEMPORAL_COMPRESSION
from ..training.sample_losses import BEHIND, NoiseLoss, decode_frame
from ..training.step import AdapterTraining

_META = torch.device("meta")
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Of the frozen models, by the run's precision."""
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
        nn.Module.to(module, DTYPES[precision]).requires_grad_(False).eval()
    if config.fp8_base:
        store_in_fp8(models.transformer, None, DTYPES[precision])
    return models


def autocast(precision: str) -> torch.dtype | None:
    """The type that mixed precision computes in; None without."""
    return None if precision == "no" else DTYPES[precision]


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
    with step.fitting(), GpuKernels(autocast(settings.loop.precision)), torch.no_grad():
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
        self.dtype = DTYPES[stage.loop.precision]
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
