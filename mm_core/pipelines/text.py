"""Prompts to T5 embeddings: the encoder is read once, each prompt is encoded once, whatever asks for it."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ..checkpoints.safetensors_file import tensor_shapes
from ..choices import QUANTISED
from ..errors import NumericsError, OutOfMemoryError
from ..memory import Part, Residence
from ..numerics import precision_name, remedy
from ..out_of_memory import out_of_memory_as
from .disk_cache import DiskCache, cache_key
from .parts import stored_dtype
from .prompt import check_text

if TYPE_CHECKING:
    from transformers import T5EncoderModel

    from .base import BaseModel

log = logging.getLogger(__name__)

_KEPT = 32  # prompts; 2 MB each
_EMBEDS = "prompt_embeds"
_ACTIVATION_BYTES = 2**30  # of one prompt in T5-XXL, generously

# The encoders that some model holds: all base models with the same files share one, and what it has made of prompts.
_shared: WeakValueDictionary[tuple[object, ...], PromptEncoder] = WeakValueDictionary()


def prompt_encoder(
    base: BaseModel,
    dtype: torch.dtype,
    residence: Residence,
    stored: str | None = None,
    cache: DiskCache | None = None,
) -> PromptEncoder:
    """The text encoder of a base model in this type. Nothing is loaded yet.

    stored: fp8, which leaves it as it is, or one of `choices.QUANTISED`.
    """
    quantised = "int8" if stored in QUANTISED else None  # with nf4 too, see quantised.py
    files = [path.resolve() for path in base.text_encoder_files if path.is_file()]
    versions = [(path, path.stat().st_mtime_ns, path.stat().st_size) for path in files]
    key = (dtype, residence, quantised, cache, *(versions or [base]))
    encoder = _shared.get(key)
    if encoder is None:
        encoder = _shared[key] = PromptEncoder(base, dtype, quantised, cache)
    return encoder


def token_ids(base: BaseModel, text: str) -> tuple[int, ...]:
    """A prompt as CogVideoXPipeline tokenises it: cut or filled to the length that the model reads."""
    length = base.transformer_config["max_text_seq_length"]
    check_text(text)
    return tuple(base.tokenizer(text, padding="max_length", max_length=length, truncation=True)["input_ids"])


class PromptEncoder:
    """A base model's text encoder and the embeddings of the last prompts, many more of them on disk."""

    def __init__(
        self, base: BaseModel, dtype: torch.dtype, quantised: str | None = None, cache: DiskCache | None = None
    ) -> None:
        self._base, self._dtype, self._quantised, self._cache = base, dtype, quantised, cache
        self._module: T5EncoderModel | None = None
        self._part: Part | None = None
        self._embeds: dict[tuple[int, ...], Tensor] = {}

    @property
    def module(self) -> T5EncoderModel:
        """T5 itself, read when it is first asked for."""
        if self._module is None:
            log.info("MagicMirror reads the text encoder of %s, %.1f GB.", self._base.name, self.size / 1e9)
            self._module = self._base.load_text_encoder(self._dtype, self._quantised)
        return self._module

    @property
    def size(self) -> int:
        """Bytes of the weights in this type, before they are quantised; read from the files' headers."""
        shapes = [item for path in self._base.text_encoder_files for item in tensor_shapes(path).items()]
        return sum(math.prod(shape) * stored_dtype(key, self._dtype).itemsize for key, shape in shapes)

    def encode(self, ids: Sequence[int], residence: Residence) -> Tensor:
        """Embeddings of a prompt's tokens, as CogVideoXPipeline makes them: (1, T, Dtxt) on the CPU.

        residence: of the encoder; that of the first call stands.

        Raises:
            NumericsError: embeddings that are not finite. OutOfMemoryError: the encoder does not fit.
        """
        ids = tuple(ids)
        if ids not in self._embeds:
            embeds = self._known(ids) if self._cache else None
            if embeds is None:
                embeds = self._run(ids, residence)
                if self._cache:
                    self._cache.put(self._key(ids), {_EMBEDS: embeds})
            if len(self._embeds) == _KEPT:
                del self._embeds[next(iter(self._embeds))]
            self._embeds[ids] = embeds
        return self._embeds[ids]

    def _key(self, ids: tuple[int, ...]) -> str:
        return cache_key(self._base.text_encoder_files, "T5", self._dtype, self._quantised, ids)

    def _known(self, ids: tuple[int, ...]) -> Tensor | None:
        """From disk."""
        found = self._cache.get(self._key(ids)) or {}
        return found.get(_EMBEDS)

    def unload(self) -> None:
        """Let go of the weights and of all embeddings in memory."""
        self._module = self._part = None
        self._embeds.clear()

    @torch.no_grad()
    def _run(self, ids: tuple[int, ...], residence: Residence) -> Tensor:
        with out_of_memory_as(_does_not_fit):
            if self._part is None:
                # Not the whole: its embedding stands there twice, and accelerate would bring it twice.
                self._part = residence.part("text_encoder", [self.module.encoder])
            with self._part.ready(_ACTIVATION_BYTES):
                embeds = self.module(torch.tensor([ids], device=self._part.device))[0].to("cpu", self._dtype)
        if not embeds.isfinite().all():
            raise NumericsError(
                f"The text encoder's embeddings of the prompt are not finite (NaN or infinity), in "
                f"{precision_name(self._dtype)}. {remedy(self._dtype)}"
            )
        return embeds


def _does_not_fit(reason: str) -> OutOfMemoryError:
    return OutOfMemoryError(
        "Not enough memory for the text encoder. Choose group or sequential as offload, or close what else uses the "
        f"memory. ({reason})"
    )
