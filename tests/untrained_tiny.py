"""`tiny` with weights of seeded noise: every real class in its small size, the same each time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel
from transformers import T5EncoderModel

from mm_core.models.adapter import MagicMirrorAdapter
from mm_core.models.id_encoder import IDEncoder
from mm_core.pipelines import tiny


def build_base(dtype: torch.dtype) -> CogVideoXPipeline:
    """The base text-to-video model on the CPU."""
    tokenizer = tiny.build_tokenizer()
    with _seeded():
        text_encoder = T5EncoderModel(tiny.text_config(len(tokenizer)))
        vae = AutoencoderKLCogVideoX(**tiny.VAE)
        transformer = CogVideoXTransformer3DModel(**tiny.TRANSFORMER)
    for module in (text_encoder, vae, transformer):
        # torch's own `to`: diffusers' warns about parts to be kept in float32 even where there are none.
        torch.nn.Module.to(module, dtype).requires_grad_(False).eval()
    return CogVideoXPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=vae,
        transformer=transformer,
        scheduler=CogVideoXDDIMScheduler(**tiny.SCHEDULER),
    )


def build_id_encoder(dtype: torch.dtype) -> IDEncoder:
    with _seeded():
        return IDEncoder(tiny.ID_ENCODER).to(dtype).requires_grad_(False).eval()


def build_adapter(dtype: torch.dtype) -> MagicMirrorAdapter:
    """An adapter whose zero-initialised parts are noise too: with those at zero it would do next to nothing."""
    with _seeded():
        adapter = MagicMirrorAdapter(tiny.ADAPTER)
        for parameter in adapter.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.02)
    return adapter.to(dtype).requires_grad_(False).eval()


@contextmanager
def _seeded() -> Iterator[None]:
    """The same weights every time, without touching the caller's random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
