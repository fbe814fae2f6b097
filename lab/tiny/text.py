"""The small T5 learns first what captions mean, as the published one knew language before it met videos.

From each of its tokens a linear map must tell the scene. Captions cost nothing: these are of clips never rendered.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, T5EncoderModel

from mm_core.pipelines import tiny
from mm_core.pipelines.prompt import identity_tokens, without_trigger
from mm_core.training.loop_config import LoopConfig
from mm_core.training.randomness import generator_for
from mm_core.training.task import Task

from ..people.captions import caption
from ..people.scene import sample_clip
from .clips import SCENE, of_latents, scene_of
from .muon import muon

DOUBLED = 0.5  # part of the captions whose person's word stands twice, as the adapter's text fusion will have it
PEOPLE, FIRST_CLIP = 1000, 1000  # of the first people, clips with numbers that nothing else uses
VALIDATION = range(10**9, 10**9 + 256)
NEIGHBOUR = 5.0  # attention logits more than for others: half of the attention


class _Reader(nn.Module):
    def __init__(self, text_encoder: T5EncoderModel, latent_frames: int) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.scene = nn.Linear(text_encoder.config.d_model, latent_frames * SCENE)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        told = self.scene(self.text_encoder(batch["ids"])[0])  # (B, tokens, F' * SCENE)
        return {"loss": (told - batch["scene"][:, None]).square().mean((1, 2))}


class TextTask(Task):
    def __init__(self, seed: int, frames: int = tiny.NUM_FRAMES) -> None:
        torch.manual_seed(seed)
        self.frames = frames
        self.tokenizer = tiny.build_tokenizer()
        text_encoder = T5EncoderModel(tiny.text_config(len(self.tokenizer)))
        _look_at_neighbours(text_encoder)
        self.model = _Reader(text_encoder, (frames - 1) // 4 + 1)
        self.seed = seed

    def batch(self, samples: range) -> dict[str, Tensor]:
        clips = [sample_clip(sample % PEOPLE, FIRST_CLIP + sample // PEOPLE, self.frames) for sample in samples]
        doubled = [float(torch.rand((), generator=generator_for(self.seed, sample))) < DOUBLED for sample in samples]
        scenes = np.stack([of_latents(scene_of(clip)).ravel() for clip in clips])
        ids = [tokens(self.tokenizer, caption(clip), double) for clip, double in zip(clips, doubled)]
        return {"ids": torch.tensor(ids), "scene": torch.from_numpy(scenes)}

    def optimizers(self, config: LoopConfig) -> list[torch.optim.Optimizer]:
        return muon(self.model, config)

    def export(self, weights: Mapping[str, Tensor], path: Path, step: int) -> None:
        export_part(self.model, "text_encoder", weights, path)

    @torch.no_grad()
    def validate(self, step: int, folder: Path) -> dict[str, float]:
        """Captions that training does not reach."""
        batch = send_to_device(self.batch(VALIDATION), self.model.scene.weight.device)
        return {"scene_loss": float(self.model(batch)["loss"].mean())}


def export_part(model: nn.Module, name: str, weights: Mapping[str, Tensor], path: Path) -> None:
    """A part of the model in its library's layout, with these weights where they name its own."""
    part = model.get_submodule(name)
    state = {key.removeprefix(f"{name}."): t for key, t in weights.items() if key.startswith(f"{name}.")}
    part.save_pretrained(path / name, state_dict=part.state_dict() | state)


@torch.no_grad()
def _look_at_neighbours(text_encoder: T5EncoderModel) -> None:
    """Heads begin with the word before, the word after, those around, and all.

    From T5's own start, all heads see all words alike, and which colour is the wall's is learnt late.
    """
    bias = text_encoder.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight  # (buckets, heads)
    half = len(bias) // 2  # of the buckets for words before, by distance; the other half is for words after
    bias.zero_()
    bias[1, 0] = bias[half + 1, 1] = NEIGHBOUR
    distance = torch.arange(half).float()
    bias[:, 2] = -torch.cat([distance, distance])


def tokens(tokenizer: PreTrainedTokenizerBase, text: str, doubled: bool) -> list[int]:
    """The ids of a caption; doubled: the person's word twice."""
    if text and doubled:
        return identity_tokens(tokenizer, text, num_slots=2, max_length=tiny.TEXT_TOKENS).ids
    return tokenizer(without_trigger(text), padding="max_length", truncation=True, max_length=tiny.TEXT_TOKENS)[
        "input_ids"
    ]
