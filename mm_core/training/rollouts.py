"""Clips that the model in training samples itself, so that the identity loss judges what a user would see.

On a noised training clip much of the person is still there to be read off, and guidance is never applied. What is
sampled has only what the model puts in, and goes through all of its errors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate.utils import gather_object
from diffusers import CogVideoXDDIMScheduler
from torch import Tensor

from .config import SamplingConfig


class Rollouts:
    """Clips in the making. Each step of training takes one for each of its samples, a DDIM step further, in turn.

    Those of a step are spread over the noise levels. Which clip, and how far it is, follow from the sample's number;
    only its latents are state, which `state_dict` holds for a resume.

    batch_size: samples a step. start: step of training that the first ones begin at.
    """

    def __init__(self, config: SamplingConfig, scheduler: CogVideoXDDIMScheduler, batch_size: int, start: int) -> None:
        self.config, self.scheduler, self.batch_size, self.first = config, scheduler, batch_size, start * batch_size
        scheduler.set_timesteps(config.steps)
        self._latents: dict[int, Tensor] = {}

    def progress(self, number: int) -> tuple[int, int]:
        """For the clip beside a sample: how many of its steps are done, and the number of the sample it began with.

        The first clips of a run begin part of the way, with that sample under noise.
        """
        visit, place = divmod(number - self.first, self.config.clips)
        batch, row = divmod(place, self.batch_size)
        done = (visit + row * self.config.steps // self.batch_size + batch) % self.config.steps
        return done, number - min(done, visit) * self.config.clips

    def timestep(self, number: int) -> Tensor:
        """() long, of the clip's next step."""
        return self.scheduler.timesteps[self.progress(number)[0]]

    def latents(self, numbers: Sequence[int], begun: Tensor) -> Tensor:
        """(B, F, C, H, W), of the clips beside these samples. begun: what those are that begin now."""
        rows = [
            row if self.progress(number)[1] == number else self._latents[self._place(number)].to(row)
            for number, row in zip(numbers, begun, strict=True)
        ]
        return torch.stack(rows)

    def advance(self, numbers: Sequence[int], predictions: Tensor, latents: Tensor) -> None:
        """Take a DDIM step with the guided predictions of v, (B, F, C, H, W), from the latents they were made of."""
        for number, prediction, noisy in zip(numbers, predictions.detach().float(), latents.float(), strict=True):
            following = self.scheduler.step(prediction, self.timestep(number), noisy, return_dict=False)[0]
            self._latents[self._place(number)] = following.cpu()

    def _place(self, number: int) -> int:
        return (number - self.first) % self.config.clips

    def state_dict(self) -> dict[str, Tensor]:
        """The latents of all processes, by place."""
        held = gather_object([(place, latents) for place, latents in sorted(self._latents.items())])
        return {str(place): latents for place, latents in held}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._latents = {int(place): latents for place, latents in state.items()}
