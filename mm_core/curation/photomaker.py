"""PhotoMaker-V2 on SDXL: another picture of a person, from portraits and a prompt.

What TencentARC/PhotoMaker does (its `pipeline.py` and `model_v2.py`), by diffusers' own pipeline and our ID encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..checkpoints.photomaker import load_id_encoder, load_lora
from ..errors import CheckpointError, PromptError
from ..evaluation.systems import open_pipeline
from ..faces.analysis import FaceAnalyzer
from ..faces.references import analyse_references
from ..memory import compute_dtype
from ..models.id_encoder import IDEncoder
from ..pipelines.identity import encode_identity
from ..pipelines.prompt import MarkedPrompt, mark_identity

STEPS, GUIDANCE = 50, 5.0
NEGATIVE = "drawing, cartoon, 3d rendering, deformed face, extra fingers, lettering, watermark, blurred, low quality"
BY_TEXT_ALONE = 0.2
"""Part of the steps in which the prompt decides without the portraits: PhotoMaker's style strength, 10 to 20%. Less of
it keeps more of the portrait, its pose and light too."""


class PhotoMaker:
    """A generator of pairs.

    pipe: SDXL, with PhotoMaker's LoRA fused in. encoder: on the device, in the pipeline's type. analyzer: finds the
    portraits' faces. steps: of a picture.
    """

    def __init__(
        self,
        pipe: StableDiffusionXLPipeline,
        encoder: IDEncoder,
        analyzer: FaceAnalyzer,
        device: torch.device,
        steps: int = STEPS,
    ) -> None:
        self.pipe, self.encoder, self.analyzer, self.device, self.steps = pipe, encoder, analyzer, device, steps

    def picture(self, portraits: Sequence[np.ndarray], prompt: str, seed: int) -> np.ndarray:
        """(H, W, 3) uint8 RGB, in the model's own size.

        portraits: (H, W, 3) uint8 RGB of one person. prompt: with `img` after the person's word.

        Raises NoFaceError, and PromptError for a prompt that names no person or is too long.
        """
        marked = mark_identity(prompt)
        references = analyse_references(self.analyzer, portraits)
        id_tokens = encode_identity(references, self.encoder, self.device).features.id_tokens.flatten(0, 1)  # (K, c)
        return self.denoised(marked, id_tokens, seed)

    @torch.no_grad()
    def denoised(self, marked: MarkedPrompt, id_tokens: Tensor, seed: int) -> np.ndarray:
        """`picture` of a person by their (K, c) ID tokens."""
        text, negative, pooled, negative_pooled = self.pipe.encode_prompt(
            marked.text, device=self.device, negative_prompt=NEGATIVE
        )
        with_person, with_person_pooled = self.text_with_person(marked, id_tokens)
        last = int(BY_TEXT_ALONE * self.steps)

        def merge(pipe: object, step: int, timestep: object, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            if step != last:
                return {}
            return {
                "prompt_embeds": torch.cat([negative, with_person]),
                "add_text_embeds": torch.cat([negative_pooled, with_person_pooled]),
            }

        made = self.pipe(
            prompt_embeds=text,
            negative_prompt_embeds=negative,
            pooled_prompt_embeds=pooled,
            negative_pooled_prompt_embeds=negative_pooled,
            num_inference_steps=self.steps,
            guidance_scale=GUIDANCE,
            generator=torch.Generator().manual_seed(seed),
            callback_on_step_end=merge,
            output_type="np",
        )
        return (255 * made.images[0]).round().astype(np.uint8)

    @torch.no_grad()
    def text_with_person(self, marked: MarkedPrompt, id_tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The prompt's embeddings, (1, 77, c), with the person in them, and the pooled ones: the person's last token
        stands there once for each ID token, fused with it."""
        pipe, embeddings = self.pipe, []
        for tokenizer, encoder in ((pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2)):
            ids, slots = with_slots(tokenizer, marked, len(id_tokens))
            found = encoder(torch.tensor([ids], device=self.device), output_hidden_states=True)
            embeddings.append(found.hidden_states[-2])
        text = torch.cat(embeddings, dim=-1).to(encoder.dtype)
        text[0, slots] = self.encoder.fuse_module(text[0, slots], id_tokens.to(text))
        return text, found[0]


def with_slots(tokenizer: PreTrainedTokenizerBase, marked: MarkedPrompt, count: int) -> tuple[list[int], slice]:
    """A prompt's token ids, padded, with the last one of the person's word `count` times, and where those stand.

    Raises PromptError for a prompt that is too long.
    """
    until, after = (
        tokenizer.encode(part, add_special_tokens=False)
        for part in (marked.text[: marked.end], marked.text[marked.end :])
    )
    ids = [tokenizer.bos_token_id, *until, *[until[-1]] * (count - 1), *after, tokenizer.eos_token_id]
    most = tokenizer.model_max_length
    if len(ids) > most:
        raise PromptError(f'"{marked.text}" has {len(ids)} tokens with the person\'s; SDXL reads {most}. Shorten it.')
    return ids + [tokenizer.pad_token_id] * (most - len(ids)), slice(len(until), len(until) + count)


def load_photomaker(
    sdxl: Path, weights: Path, analyzer: FaceAnalyzer, device: torch.device, *, precision: str, offload: str, steps: int
) -> PhotoMaker:
    """sdxl: a folder in diffusers' layout. weights: `photomaker-v2.bin`, or the safetensors copy of it.
    precision: auto, bf16, fp16, fp32. offload: none, model, sequential.

    Raises CheckpointError for either that is missing, damaged or something else.
    """
    dtype = compute_dtype(precision, device)
    encoder, lora = load_id_encoder(weights, dtype=dtype), load_lora(weights)
    try:
        pipe = open_pipeline(StableDiffusionXLPipeline, sdxl, dtype)
    except CheckpointError as error:
        raise CheckpointError(f"{error}, such as stabilityai/stable-diffusion-xl-base-1.0") from error
    wanted, there = encoder.fuse_module.layer_norm.normalized_shape[0], pipe.unet.config.cross_attention_dim
    if wanted != there:
        raise CheckpointError(f"{weights.name} is for text of {wanted} numbers a token, {sdxl} has {there}: use SDXL.")
    pipe.watermark = None  # where a package for it is installed
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.load_lora_weights(lora)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    _place(pipe, device, offload)
    return PhotoMaker(pipe, encoder.to(device), analyzer, device, steps)


def _place(pipe: Any, device: torch.device, offload: str) -> None:
    if device.type == "cpu" or offload == "none":
        pipe.to(device)
    elif offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    else:
        pipe.enable_sequential_cpu_offload(device=device)
