"""Base models: where their files are, what they can make, and how they are loaded into diffusers' own pipeline.

Configs and tokenizer are read at once, weights only when a clip is to be sampled: a mistake in a prompt or a size is
told before anything heavy happens.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXTransformer3DModel,
)
from torch import Tensor
from transformers import PreTrainedTokenizerBase, T5Config, T5EncoderModel

from ..choices import TINY
from ..errors import CheckpointError, downloading
from ..json_file import read_object
from ..limits import INDEX_BYTES, SHARDS
from . import part_configs, tiny
from .part_configs import check_index, check_positions, checked
from .parts import Pipeline, build_scheduler, load_text_encoder, load_transformer, load_vae
from .presets import PRESETS, ClipLimits, Sampling
from .preview import LATENT_RGB, load_latent_rgb
from .tokenizer import load_tokenizer

_T5 = T5Config()  # what transformers takes for what a config does not have

class BaseModel(ABC):
    """A CogVideoX text-to-video model that has not been loaded yet."""

    sampling: ClassVar[Sampling] = Sampling()
    """What it samples with where nothing else is asked for."""

    @property
    @abstractmethod
    def name(self) -> str: ...

    @property
    @abstractmethod
    def transformer_config(self) -> Mapping[str, Any]:
        """diffusers' config of the transformer. Raises CheckpointError when a file is missing or another model's."""

    @property
    @abstractmethod
    def vae_config(self) -> Mapping[str, Any]:
        """diffusers' config of the VAE."""

    @property
    @abstractmethod
    def text_config(self) -> Mapping[str, Any]:
        """transformers' config of T5, what it needs of it."""

    @property
    @abstractmethod
    def transformer_files(self) -> list[Path]:
        """Where the transformer's weights are, under diffusers' key names."""

    @property
    @abstractmethod
    def vae_files(self) -> list[Path]:
        """Where the VAE's weights are."""

    @property
    @abstractmethod
    def text_encoder_files(self) -> list[Path]:
        """Where the text encoder's weights are."""

    @property
    @abstractmethod
    def tokenizer(self) -> PreTrainedTokenizerBase: ...

    @abstractmethod
    def load_scheduler(self) -> CogVideoXDDIMScheduler | CogVideoXDPMScheduler:
        """The noise levels that the model was trained at."""

    @property
    def limits(self) -> ClipLimits:
        """What clips it can make."""
        return ClipLimits.from_config(self.transformer_config, self.vae_config)

    @property
    def latent_rgb(self) -> Tensor | None:
        """(C + 1, 3), the map of `preview.fit_latent_rgb` where it comes with the model."""
        return None

    def load_text_encoder(self, dtype: torch.dtype, quantised: str | None = None) -> T5EncoderModel:
        """The text encoder alone, on the CPU. quantised: one of `choices.QUANTISED`."""
        return load_text_encoder(self.text_config, self.text_encoder_files, dtype, quantised)

    def load_vae(self, dtype: torch.dtype) -> AutoencoderKLCogVideoX:
        """The VAE alone, on the CPU."""
        return load_vae(self.vae_config, self.vae_files, dtype)

    def load(self, dtype: torch.dtype, *, text_encoder: bool = True, quantised: str | None = None) -> Pipeline:
        """The pipeline with all weights, on the CPU; with no text encoder, half as large, where none is wanted."""
        return Pipeline(
            tokenizer=self.tokenizer,
            text_encoder=self.load_text_encoder(dtype, quantised) if text_encoder else None,
            vae=self.load_vae(dtype),
            transformer=load_transformer(self.transformer_config, self.transformer_files, dtype, quantised),
            scheduler=self.load_scheduler(),
        )


@dataclass(frozen=True)
class FolderBase(BaseModel):
    """A model in diffusers' folder layout, as on the Hugging Face hub."""

    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    @cached_property
    def transformer_config(self) -> Mapping[str, Any]:
        path = self.folder / "transformer" / "config.json"
        config = self._config("transformer")
        if config.get("_class_name") != CogVideoXTransformer3DModel.__name__:
            raise CheckpointError(
                f"{self.folder} holds a {config.get('_class_name')}, not a CogVideoX transformer. Choose a folder of "
                f"{', '.join(preset.repo for preset in PRESETS.values())}."
            )
        settings = _defaults(CogVideoXTransformer3DModel) | checked(config, part_configs.TRANSFORMER, str(path))
        if settings["in_channels"] != settings["out_channels"]:
            raise CheckpointError(f"{self.folder} is an image-to-video model; Magic Mirror needs a text-to-video one.")
        check_positions(settings, str(path))
        return settings

    @cached_property
    def vae_config(self) -> Mapping[str, Any]:
        where = str(self.folder / "vae" / "config.json")
        return _defaults(AutoencoderKLCogVideoX) | checked(self._config("vae"), part_configs.VAE, where)

    @cached_property
    def text_config(self) -> Mapping[str, Any]:
        where = str(self.folder / "text_encoder" / "config.json")
        return checked(self._config("text_encoder"), part_configs.TEXT_ENCODER, where)

    @property
    def transformer_files(self) -> list[Path]:
        return self._files("transformer")

    @property
    def vae_files(self) -> list[Path]:
        return self._files("vae")

    @property
    def text_encoder_files(self) -> list[Path]:
        return self._files("text_encoder")

    def load_scheduler(self) -> CogVideoXDDIMScheduler | CogVideoXDPMScheduler:
        where = self.folder / "scheduler" / "scheduler_config.json"
        config = read_object(where)
        settings = checked(config, part_configs.SCHEDULER, str(where))
        return build_scheduler(settings, config.get("_class_name", "CogVideoXDDIMScheduler"))

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        tokenizer, size = load_tokenizer(self.folder / "tokenizer"), self.text_config.get("vocab_size", _T5.vocab_size)
        if len(tokenizer) > size:
            raise CheckpointError(
                f"The tokenizer of {self.folder} has {len(tokenizer)} tokens, its text encoder {size}: they are of "
                "different models. Download it again."
            )
        return tokenizer

    def load(self, dtype: torch.dtype, *, text_encoder: bool = True, quantised: str | None = None) -> Pipeline:
        self.check_complete()
        try:
            return super().load(dtype, text_encoder=text_encoder, quantised=quantised)
        except CheckpointError as error:
            raise CheckpointError(
                f"{self.folder} is incomplete or damaged: {error} Download it again; finished files are kept."
            ) from error

    def missing_files(self) -> list[str]:
        """What the folder lacks, relative to it. Sharded weights count by shard."""
        wanted = ["model_index.json", "scheduler/scheduler_config.json"]
        for part in ("transformer", "vae", "text_encoder"):
            wanted += [f"{part}/config.json", *self._weights(part)]
        missing = [file for file in wanted if not (self.folder / file).is_file()]
        if not any((self.folder / "tokenizer" / file).is_file() for file in ("spiece.model", "tokenizer.json")):
            missing.append("tokenizer/spiece.model")
        return missing

    def check_complete(self) -> None:
        """Raise CheckpointError, naming what is missing or does not fit, before half a model is loaded."""
        missing = self.missing_files()
        if missing:
            raise CheckpointError(f"{self.folder} is incomplete, it lacks {', '.join(missing)}. Download it again.")
        check_index(self.folder / "model_index.json")
        text, latents = self.text_config.get("d_model", _T5.d_model), self.vae_config["latent_channels"]
        pairs = (
            ("text_embed_dim", self.transformer_config["text_embed_dim"], "the text encoder's d_model", text),
            ("in_channels", self.transformer_config["in_channels"], "the VAE's latent_channels", latents),
        )
        for name, value, other, size in pairs:
            if value != size:
                raise CheckpointError(
                    f"The parts of {self.folder} are of different models: the transformer's {name} is {value}, {other} "
                    f"is {size}. Download it again."
                )

    def _files(self, part: str) -> list[Path]:
        return [self.folder / file for file in self._weights(part)]

    def _weights(self, part: str) -> list[str]:
        """The files of a part's weights, relative to the folder."""
        stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        index = self.folder / part / f"{stem}.safetensors.index.json"
        if not index.is_file():
            return [f"{part}/{stem}.safetensors"]
        places = read_object(index, most=INDEX_BYTES).get("weight_map")
        shards = set(places.values()) if _is_index(places) else set()
        if not shards or len(shards) > SHARDS or not all(map(_is_shard, shards)):
            raise CheckpointError(
                f"{index} is damaged: its weight_map must name .safetensors files beside it, {SHARDS} at most. "
                "Download it again."
            )
        return [f"{part}/{file}" for file in sorted(shards)]

    def _config(self, part: str) -> dict[str, Any]:
        path = self.folder / part / "config.json"
        if not path.is_file():
            raise CheckpointError(
                f"There is no {path}. The folder of a base model must hold model_index.json, scheduler/, "
                "text_encoder/, tokenizer/, transformer/ and vae/, as on the Hugging Face hub."
            )
        return read_object(path)


@dataclass(frozen=True)
class TinyBase(FolderBase):
    """The small model that comes with the pack; its folder holds its adapter and ID encoder too."""

    folder: Path = tiny.WEIGHTS
    sampling: ClassVar[Sampling] = tiny.SAMPLING

    @property
    def name(self) -> str:
        return TINY

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter.safetensors"

    @property
    def id_encoder(self) -> Path:
        return self.folder / "id_encoder.safetensors"

    @cached_property
    def latent_rgb(self) -> Tensor | None:
        return load_latent_rgb(self.folder / LATENT_RGB)


def download_folder(repo: str, folder: Path) -> Path:
    """Fetch a model from the Hugging Face hub into `folder`; call it only when the user asked for a download.

    What is there already is kept, and a download that was cut off goes on where it stopped.
    """
    from huggingface_hub import snapshot_download

    parts = ["model_index.json", "LICENSE*", "scheduler/*", "text_encoder/*", "tokenizer/*", "transformer/*", "vae/*"]
    with downloading(f"{repo} into {folder}"):
        snapshot_download(repo, local_dir=folder, allow_patterns=parts)
    return folder


def _defaults(cls: type) -> dict[str, Any]:
    """What diffusers takes for settings that a config does not have."""
    parameters = inspect.signature(cls.__init__).parameters.values()
    return {item.name: item.default for item in parameters if item.default is not inspect.Parameter.empty}


def _is_index(places: Any) -> bool:
    return isinstance(places, dict) and all(isinstance(file, str) for file in places.values())


def _is_shard(file: str) -> bool:
    """The name of a weights file in the same folder: neither a path nor a pickle."""
    return file.endswith(".safetensors") and not set(file) & set("/\\:\0")
