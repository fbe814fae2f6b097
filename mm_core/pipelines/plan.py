"""What a clip needs of a device, phase by phase, known before anything is loaded: from configs, on torch's `meta`."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from torch import nn
from transformers import T5Config, T5EncoderModel

from .. import memory
from ..choices import POLICIES, QUANTISED, STORED
from ..counting import counted
from ..hosts.cogvideox_diffusers import HOST
from ..memory import sampling_parts, size_in_bytes, store_in_fp8
from ..models.adapter import MagicMirrorAdapter
from ..models.config import AdapterConfig
from ..models.id_encoder import FaceFeatures
from .clip import ClipSettings
from .decode import Key, as_key, choose_tiles, decode_bytes
from .parts import stored_dtype
from .presets import PRESETS, T5_XXL, ClipLimits, Preset, Sampling, latent_shape
from .quantised import shrink

PHASES = {"text": "text_encoder", "identity": "transformer", "steps": "transformer", "decoding": "vae"}
"""In their order, and the part of the model whose turn it is."""
_PHOTO_TOKENS = 257  # of the ViT of PhotoMaker-V2, for one photo
_WORKSPACE = {"cuda": 32 * 2**20}
"""What a device's matrix products take for themselves: torch gives cuBLAS this much from Hopper on, 8 MiB before."""
_CUDA = torch.device("cuda")
_GB = 1e9


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Bytes of a clip, and what follows from them."""

    weights: Mapping[str, int]
    """Of each part: text_encoder; transformer, with the layers of the adapter that every step runs; vae."""
    streamed: Mapping[str, Mapping[str, int]]
    """Of the same, what is on the device at once in each phase under `group` and `sequential`."""
    beside: Mapping[str, int]
    """What each phase needs for itself; decoding in the smallest tiles."""
    whole: int
    """What decoding needs for whole frames."""
    policies: tuple[str, ...] = POLICIES
    """Those that the weights can rest under."""

    def peaks(self, policy: str) -> dict[str, int]:
        """Bytes on the device in each phase, under one of `choices.POLICIES`."""
        if policy == "none":
            return {phase: sum(self.weights.values()) + size for phase, size in self.beside.items()}
        whole = {phase: self.weights[part] for phase, part in PHASES.items()}
        return {phase: size + self.beside[phase] for phase, size in (self.streamed.get(policy) or whole).items()}

    def choose(self, free: int) -> str:
        """The policy that moves the fewest weights of those that fit; the smallest where none does."""
        *larger, smallest = self.policies
        return next((policy for policy in larger if max(self.peaks(policy).values()) <= free), smallest)

    def line(self, policy: str, memory: tuple[int, int] | None) -> str:
        """One line for the user. policy: auto where ComfyUI decides. memory: bytes that are free, and all."""
        needs = ", ".join(
            f"{phase} {self.weights[part] / _GB:.1f} + {self.beside[phase] / _GB:.1f}" for phase, part in PHASES.items()
        )
        room = "" if memory is None else f" {memory[0] / _GB:.1f} of {memory[1] / _GB:.1f} GB are free."
        who = f"offload {policy}" if policy in POLICIES else "ComfyUI brings a part at a time"
        most = max(self.peaks(policy if policy in POLICIES else "model").values()) / _GB
        return (
            f"plan: GB of weights + of work for each phase: {needs} in the smallest tiles, {self.whole / _GB:.1f} "
            f"whole.{room} {who}: at most {most:.1f} GB at once."
        )


def plan_of(
    *,
    text: Mapping[str, Any],
    transformer: Mapping[str, Any],
    vae: Mapping[str, Any],
    adapter: AdapterConfig | None,
    clip: ClipSettings,
    dtype: torch.dtype,
    vae_dtype: torch.dtype,
    stored: str | None = None,
    device: torch.device = _CUDA,
    tokens: int = _PHOTO_TOKENS,
) -> Plan:
    """Count a clip.

    Args:
        text, transformer, vae: configs of the parts.
        stored: one of `choices.STORED`, for the large layers.
        tokens: of all photos of the person, as the image encoder sees them.
    """
    shape = (1, *latent_shape(vae, frames=clip.num_frames, height=clip.height, width=clip.width))
    frames = shape[2] + -shape[2] % (transformer.get("patch_size_t") or 1)
    sizes = (frames, *shape[3:], 2 if clip.guidance_scale > 1 else 1)
    base = as_key(CogVideoXTransformer3DModel, transformer)
    encoder, pictures = tuple(sorted(text.items())), as_key(AutoencoderKLCogVideoX, vae)
    ahead = device.type in memory.STREAMING
    weights, streamed, widened = _parts(encoder, base, pictures, adapter, dtype, vae_dtype, stored, ahead)
    least = choose_tiles(vae, vae_dtype, shape, 0)
    beside = {
        "text": _text_bytes(encoder, dtype, transformer["max_text_seq_length"]),
        "identity": 0 if adapter is None else _identity_bytes(base, adapter, dtype, tokens, clip.steps),
        "steps": widened + _step_bytes(base, dtype, *sizes),
        "decoding": decode_bytes(vae, vae_dtype, shape, least),
    }
    beside = {phase: size + _WORKSPACE.get(device.type, 0) for phase, size in beside.items()}
    # The embedding is larger than any layer, and there before the rest computes.
    embedding = text["vocab_size"] * text["d_model"] * dtype.itemsize - beside["text"]
    streamed = {policy: of | {"text": max(of["text"], embedding)} for policy, of in streamed.items()}
    return Plan(
        weights=weights, streamed=streamed, beside=beside, whole=decode_bytes(vae, vae_dtype, shape, None),
        policies=("none", "model") if stored == "nf4" else POLICIES,
    )  # fmt: skip


def _on_meta(cls: type[nn.Module], key: Key, dtype: torch.dtype, **changes: Any) -> Any:
    with torch.device("meta"):
        return nn.Module.to(cls(**dict(key) | changes), dtype).eval()


@functools.lru_cache(maxsize=8)
def _parts(
    text: Key,
    transformer: Key,
    vae: Key,
    config: AdapterConfig | None,
    dtype: torch.dtype,
    vae_dtype: torch.dtype,
    stored: str | None,
    ahead: bool,
) -> tuple[dict[str, int], dict[str, dict[str, int]], int]:
    """`weights` and `streamed` of a plan, and the largest layer that is widened to compute.

    ahead: `group` has the next weights there while some compute.
    """
    with torch.device("meta"):
        encoder = T5EncoderModel(T5Config(**dict(text)))
        encoder.set_input_embeddings(encoder.shared)
    for name, weight in encoder.named_parameters():
        weight.data = weight.data.to(stored_dtype(name, dtype))
    base = _on_meta(CogVideoXTransformer3DModel, transformer, dtype)
    pictures = _on_meta(AutoencoderKLCogVideoX, vae, vae_dtype)
    adapter = None
    if config is not None:
        with torch.device("meta"):
            adapter = MagicMirrorAdapter(config).to(dtype)
    block = base.transformer_blocks[0]
    widened = 0 if stored is None else _largest_layer(block)
    if stored == "fp8":
        store_in_fp8(base, adapter, dtype)
    if stored in QUANTISED:
        shrink(base, stored)
        shrink(encoder, stored)
    layers = [] if adapter is None else sampling_parts(adapter)
    weights = {
        "text_encoder": size_in_bytes(encoder),
        "transformer": size_in_bytes(base) + sum(map(size_in_bytes, layers)),
        "vae": size_in_bytes(pictures),
    }
    kept = max(map(size_in_bytes, layers), default=0)
    modulation, one = size_in_bytes(block.norm1.linear), size_in_bytes(block)
    around = size_in_bytes(base) - sum(map(size_in_bytes, base.transformer_blocks))
    by_layer = {"text": _largest_layer(encoder.encoder.block), "identity": modulation}
    return weights, {
        # Under `group` what is around the blocks stays for the whole of a pass.
        "group": by_layer
        | {"steps": around + (1 + ahead) * one + kept, "decoding": _largest_layer(pictures, 1 + ahead)},
        "sequential": by_layer
        | {"steps": (_largest_layer(base) if adapter is None else one) + kept, "decoding": _largest_layer(pictures)},
    }, widened


def _largest_layer(module: nn.Module, number: int = 1) -> int:
    """Bytes of the largest layer, or of that many in a row."""
    sizes = [sum(x.nbytes for x in part.parameters(recurse=False)) for part in module.modules()]
    sizes = [size for size in sizes if size]
    return max(sum(sizes[first : first + number]) for first in range(len(sizes)))


@functools.lru_cache(maxsize=8)
def _text_bytes(text: Key, dtype: torch.dtype, length: int) -> int:
    """All blocks are alike: one is counted; beside the embeddings of two other prompts."""
    with torch.device("meta"):
        encoder = T5EncoderModel(T5Config(**dict(text) | {"num_layers": 1})).to(dtype).eval()
        with counted() as live:
            embeds = encoder(torch.zeros(1, length, dtype=torch.long))[0]
    return live.peak + 2 * embeds.nbytes


@functools.lru_cache(maxsize=8)
def _identity_bytes(
    transformer: Key, config: AdapterConfig, dtype: torch.dtype, tokens: int, steps: int
) -> int:
    """Weights that visit the device before the first step, and what is computed with them."""
    base = _on_meta(CogVideoXTransformer3DModel, transformer, dtype, num_layers=1)
    with torch.device("meta"):
        adapter = MagicMirrorAdapter(config).to(dtype).eval()
        photos = FaceFeatures(
            id_tokens=torch.empty(1, config.num_id_tokens, config.id_token_dim, dtype=dtype),
            structure_tokens=torch.empty(1, tokens, config.clip_hidden_size, dtype=dtype),
        )
        with counted() as live:
            adapter.face_tokens(photos)
        people = [adapter.face_perceiver, adapter.face_proj, adapter.id_fusion, adapter.id_proj]
        person = sum(map(size_in_bytes, people)) + live.peak
        block = next(iter(adapter.blocks.values()))
        with counted() as live:
            temb = HOST.time_embedding(base, torch.zeros(steps), dtype)
            shift = HOST.parts(base.transformer_blocks[0]).video_shift(temb)
            embedding = torch.empty(1, config.id_proj_dim, dtype=dtype).expand(steps, -1)
            torch.cat(block.factors(embedding, temb, shift), dim=1)
    return max(person, size_in_bytes(block.can) + size_in_bytes(block.face_modulation) + live.peak)


@functools.lru_cache(maxsize=16)
def _step_bytes(transformer: Key, dtype: torch.dtype, frames: int, height: int, width: int, rows: int) -> int:
    """All blocks are alike: one is counted. The rows with identity and those without come one after the other."""
    base = _on_meta(CogVideoXTransformer3DModel, transformer, dtype, num_layers=1)
    config = base.config
    tokens = frames // (config.patch_size_t or 1) * (height // config.patch_size) * (width // config.patch_size)
    rotary = config.use_rotary_positional_embeddings
    with torch.device("meta"), counted() as live:
        latents = torch.empty(1, frames, config.in_channels, height, width, dtype=dtype)
        before = torch.empty_like(latents)  # of two steps, which the solver keeps
        base(
            hidden_states=torch.cat([latents] * rows),
            encoder_hidden_states=torch.empty(
                rows, config.max_text_seq_length, config.text_embed_dim, dtype=dtype
            ),
            timestep=torch.zeros(rows),
            image_rotary_emb=tuple(torch.empty(2, tokens, config.attention_head_dim)) if rotary else None,
        )
        del before
    return live.peak


CARDS = (8, 12, 16, 24, 48)
"""GiB of memory that graphics cards have."""
_FREE = 0.92  # of it, beside the screen and the driver


def published_plan(preset: Preset, stored: str | None = None) -> Plan:
    """A published model with the paper's adapter, in bf16, at what it makes best, on CUDA."""
    transformer = dict(as_key(CogVideoXTransformer3DModel, preset.transformer))
    limits = ClipLimits.from_config(transformer, preset.vae)
    clip = ClipSettings.of_model(limits, Sampling(), prompt="")
    return plan_of(
        text=T5_XXL, transformer=transformer, vae=preset.vae, adapter=AdapterConfig.for_base(transformer), clip=clip,
        dtype=torch.bfloat16, vae_dtype=torch.bfloat16, stored=stored,
    )  # fmt: skip


def table() -> str:
    """Markdown: what `auto` chooses for the published models on cards of some sizes, and GiB at once."""
    lines = ["| model | precision |" + "".join(f" {card} GB |" for card in CARDS), "|---" * (2 + len(CARDS)) + "|"]
    for name, preset in PRESETS.items():
        for precision in ("bf16", *STORED):
            plan = published_plan(preset, None if precision == "bf16" else precision)
            cells = []
            for card in CARDS:
                free = int(_FREE * card * 2**30)
                policy = plan.choose(free)
                most = max(plan.peaks(policy).values())
                cells.append(f"{policy}, {most / 2**30:.1f}" if most <= free else "-")
            lines.append(f"| {name} | {precision} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
