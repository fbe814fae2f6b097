"""Base models: where their files are, what they can make, and how they are loaded into diffusers' own pipeline.

Configs and tokenizer are read at once, weights only when a clip is to be sampled: a mistake in a prompt or a size is
told before anything heavy happens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import diffusers
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel
from packaging.version import Version
from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedTokenizerBase, T5Config, T5EncoderModel

from ..checkpoints.safetensors_file import check_tensors, open_safetensors, shapes_in, tensor_shapes
from ..errors import CheckpointError, downloading
from . import tiny
from .presets import PRESETS, T5_XXL, ClipLimits, Preset
from .single_file import model_of

# diffusers 0.42 renamed the argument, and drops the old name in 1.0.
_DTYPE = "dtype" if Version(diffusers.__version__) >= Version("0.42") else "torch_dtype"


class BaseModel(Protocol):
    """A CogVideoX text-to-video model that has not been loaded yet."""

    name: str

    @property
    def transformer_config(self) -> Mapping[str, Any]:
        """diffusers' config of the transformer. Raises CheckpointError when a file is missing or another model's."""

    @property
    def limits(self) -> ClipLimits: ...

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase: ...

    @property
    def vae_config(self) -> Mapping[str, Any]:
        """diffusers' config of the VAE."""

    @property
    def transformer_files(self) -> list[Path]:
        """Where the transformer's weights are, under diffusers' key names."""

    def load_text_encoder(self, dtype: torch.dtype) -> T5EncoderModel:
        """The text encoder alone, on the CPU."""

    def load(self, dtype: torch.dtype) -> CogVideoXPipeline:
        """The pipeline with all weights, on the CPU."""


@dataclass(frozen=True)
class FolderBase:
    """A model in diffusers' folder layout, as on the Hugging Face hub."""

    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    @cached_property
    def transformer_config(self) -> Mapping[str, Any]:
        config = self._config("transformer")
        if config.get("_class_name") != CogVideoXTransformer3DModel.__name__:
            raise CheckpointError(
                f"{self.folder} holds a {config.get('_class_name')}, not a CogVideoX transformer. Choose a folder of "
                f"{', '.join(preset.repo for preset in PRESETS.values())}."
            )
        if config["in_channels"] != config["out_channels"]:
            raise CheckpointError(f"{self.folder} is an image-to-video model; Magic Mirror needs a text-to-video one.")
        return (
            dict(CogVideoXTransformer3DModel.load_config(self.folder / "transformer")) | {"patch_size_t": None} | config
        )

    @cached_property
    def limits(self) -> ClipLimits:
        return ClipLimits.from_config(self.transformer_config, self.vae_config)

    @cached_property
    def vae_config(self) -> Mapping[str, Any]:
        return self._config("vae")

    @property
    def transformer_files(self) -> list[Path]:
        return [self.folder / file for file in self._weights("transformer")]

    def load_text_encoder(self, dtype: torch.dtype) -> T5EncoderModel:
        encoder = T5EncoderModel.from_pretrained(self.folder / "text_encoder", local_files_only=True)
        return encoder.to(dtype).requires_grad_(False).train(False)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return _load_tokenizer(self.folder / "tokenizer")

    def load(self, dtype: torch.dtype) -> CogVideoXPipeline:
        try:
            pipe = CogVideoXPipeline.from_pretrained(
                str(self.folder), tokenizer=self.tokenizer, local_files_only=True, **{_DTYPE: dtype}
            )
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{self.folder} is incomplete or damaged: {error}. Download it again; finished files are kept."
            ) from error
        return _freeze(pipe)

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
        """Raise CheckpointError, naming what is missing, before half a model is loaded."""
        missing = self.missing_files()
        if missing:
            raise CheckpointError(f"{self.folder} is incomplete, it lacks {', '.join(missing)}. Download it again.")

    def _weights(self, part: str) -> list[str]:
        """The files of a part's weights, relative to the folder."""
        stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        index = self.folder / part / f"{stem}.safetensors.index.json"
        shards = [f"{stem}.safetensors"]
        if index.is_file():
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        return [f"{part}/{file}" for file in shards]

    def _config(self, part: str) -> dict[str, Any]:
        path = self.folder / part / "config.json"
        if not path.is_file():
            raise CheckpointError(
                f"There is no {path}. The folder of a base model must hold model_index.json, scheduler/, "
                "text_encoder/, tokenizer/, transformer/ and vae/, as on the Hugging Face hub."
            )
        return json.loads(path.read_text(encoding="utf-8"))


@dataclass(frozen=True)
class TinyBase(FolderBase):
    """The small model that comes with the pack; its folder holds its adapter and ID encoder too."""

    folder: Path = tiny.WEIGHTS

    @property
    def name(self) -> str:
        return tiny.NAME

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter.safetensors"

    @property
    def id_encoder(self) -> Path:
        return self.folder / "id_encoder.safetensors"


@dataclass(frozen=True, kw_only=True)
class FileBase:
    """A model as single `.safetensors` files with diffusers' key names, one for each part."""

    transformer: Path
    text_encoder: Path
    """T5-XXL, as in `t5xxl_fp16.safetensors`."""
    vae: Path
    tokenizer_folder: Path
    """A folder with a T5 tokenizer (`tokenizer.json` or `spiece.model`)."""

    @property
    def name(self) -> str:
        return self.transformer.name

    @cached_property
    def preset(self) -> Preset:
        """The published model whose tensors are exactly those of the file."""
        repo = model_of(tensor_shapes(self.transformer), "transformer")
        for preset in PRESETS.values():
            if preset.repo == repo:
                return preset
        raise CheckpointError(
            f"The tensors of {self.transformer.name} are not those of {', '.join(PRESETS)} under diffusers' names. Use "
            "a diffusers folder, or a file converted from one."
        )

    @property
    def transformer_config(self) -> Mapping[str, Any]:
        return {"patch_size_t": None, "max_text_seq_length": 226} | self.preset.transformer

    @property
    def limits(self) -> ClipLimits:
        return ClipLimits.from_config(self.preset.transformer, self.preset.vae)

    @property
    def vae_config(self) -> Mapping[str, Any]:
        return self.preset.vae

    @property
    def transformer_files(self) -> list[Path]:
        return [self.transformer]

    def load_text_encoder(self, dtype: torch.dtype) -> T5EncoderModel:
        with torch.device("meta"):
            encoder = T5EncoderModel(T5Config(**T5_XXL))
        _load_file(encoder, self.text_encoder, dtype)
        return encoder.requires_grad_(False).train(False)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return _load_tokenizer(self.tokenizer_folder)

    def load(self, dtype: torch.dtype) -> CogVideoXPipeline:
        with torch.device("meta"):
            transformer = CogVideoXTransformer3DModel(**self.preset.transformer)
            vae = AutoencoderKLCogVideoX(**self.preset.vae)
        if not self.preset.transformer["use_rotary_positional_embeddings"]:
            # The sine table of 2B is computed, not stored: it must not stay on `meta`.
            embed = transformer.patch_embed
            table = embed._get_positional_embeddings(embed.sample_height, embed.sample_width, embed.sample_frames)
            embed.register_buffer("pos_embedding", table, persistent=False)
        for module, path in ((transformer, self.transformer), (vae, self.vae)):
            _load_file(module, path, dtype)
        return _freeze(
            CogVideoXPipeline(
                tokenizer=self.tokenizer,
                text_encoder=self.load_text_encoder(dtype),
                vae=vae,
                transformer=transformer,
                scheduler=CogVideoXDDIMScheduler(**self.preset.scheduler),
            )
        )


def download_folder(repo: str, folder: Path) -> Path:
    """Fetch a model from the Hugging Face hub into `folder`; call it only when the user asked for a download.

    What is there already is kept, and a download that was cut off goes on where it stopped.
    """
    from huggingface_hub import snapshot_download

    parts = ["model_index.json", "LICENSE*", "scheduler/*", "text_encoder/*", "tokenizer/*", "transformer/*", "vae/*"]
    with downloading(f"{repo} into {folder}"):
        snapshot_download(repo, local_dir=folder, allow_patterns=parts)
    return folder


def _freeze(pipe: CogVideoXPipeline) -> CogVideoXPipeline:
    for module in (pipe.text_encoder, pipe.vae, pipe.transformer):
        module.requires_grad_(False).train(False)
    return pipe


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    if not (folder / "tokenizer.json").is_file():
        # What spiece.model is read with. Where one is missing, transformers asks for tiktoken, which would not help.
        import google.protobuf  # noqa: F401
        import sentencepiece  # noqa: F401
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _load_file(module: torch.nn.Module, path: Path, dtype: torch.dtype) -> None:
    """Load a file strictly into a module on `meta`; tied weights may stand in the file once."""
    expected = {key: tensor.shape for key, tensor in module.state_dict().items()}
    tied = {"encoder.embed_tokens.weight": "shared.weight"}
    with open_safetensors(path) as file:
        found = shapes_in(file)
        check_tensors(path, {k: s for k, s in expected.items() if k in found or k not in tied}, found)
        weights = {key: file.get_tensor(key).to(dtype) for key in found}
    for copy, original in tied.items():
        if copy in expected:
            weights[copy] = weights[original]
    module.load_state_dict(weights, assign=True)
