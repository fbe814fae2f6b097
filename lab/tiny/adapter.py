"""The small model's adapter: the product's two stages with Muon, then a third on clips that it samples itself.

The identity loss on sampled clips is the product's. What stands beside it here keeps a drawn face moving, which that
loss alone does not mind: the training clip's looks, the motion that the base would give the clip, and what two networks
see that the renderer taught (`judges`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mm_core.data.features import Features
from mm_core.training.adapter_task import AdapterTask
from mm_core.training.config import TrainingConfig
from mm_core.training.diffusion import predict_clean
from mm_core.training.loop_config import LoopConfig
from mm_core.training.rollouts import Rollouts
from mm_core.training.sample_losses import IdentityLoss, NoiseLoss, Pass, SampleLoss
from mm_core.training.step import AdapterTraining, guide

from ..people.manifest import repeats_of
from .clips import windows
from .judges import RenderedJudge, description
from .likeness import centred_identity_loss
from .motion import motion_loss
from .muon import muon

MOTION_WEIGHT = 1.4
MOTION_FROM, MOTION_BELOW = 800, 0.6
"""Noise level from which on the weight is whole, and the part of it below. The base's motion is that of another face:
where the person's is drawn, the latents cannot have both."""
CLEAN_WEIGHT, CLEAN_FROM = 3.0, 300
"""Of what a recogniser does not see; below that noise level a sampled clip has gone its own way."""


class TinyTask(AdapterTask):
    """A stage as the product trains it, with Muon; in clips, what is rare comes up more often, or is learnt last."""

    def __init__(self, config: TrainingConfig, stage: str, start: Path | None = None) -> None:
        super().__init__(config, stage, start)
        if stage == "video":
            clips = [description(self.features.entries[row]["id"]) for row in self.training]
            self.training = np.repeat(self.training, [repeats_of(clip) for clip in clips])

    def optimizers(self, config: LoopConfig) -> list[torch.optim.Optimizer]:
        return muon(self.model, config)


class SampledTask(TinyTask):
    """The third stage. judge: of sampled clips."""

    def __init__(self, config: TrainingConfig, stage: str, start: Path | None = None, *, judge: RenderedJudge) -> None:
        self.judge = judge
        super().__init__(config, stage, start)

    def losses(self) -> tuple[Sequence[SampleLoss], Rollouts | None, Sequence[SampleLoss]]:
        height, width = self.features.sample(0)["latents"].shape[-2:]
        parts = windows(height, width)
        base = GuidedBase(self)
        sampled = [MeanFrameLoss(), SampledMotionLoss(parts, base), PoseLoss(self.judge, base), self.identity_loss()]
        return [NoiseLoss(), MotionLoss(parts)], self.state, sampled

    def identity_loss(self) -> IdentityLoss:
        return TwoRecognisers(super().identity_loss(), mean_embedding(self.features), self.judge)


class GuidedBase:
    """x0 of the base alone for a pass of sampled clips, guided as theirs; made once, however many losses ask."""

    def __init__(self, task: AdapterTask) -> None:
        self.task, self._last = task, (None, None)

    @torch.no_grad()
    def __call__(self, passed: Pass) -> Tensor:
        if self._last[0] is not passed:
            model: AdapterTraining = self.task.model
            plain = model.predict(passed.batch, passed.batch["text"], None)
            guided = guide(passed.negative, plain, model.rollouts.config.guidance)
            self._last = passed, predict_clean(guided, passed.batch["noisy"], passed.batch["alpha_bar"])
        return self._last[1]


class MotionLoss:
    """How a noised clip moves."""

    name, weight = "motion_loss", MOTION_WEIGHT

    def __init__(self, parts: Sequence[Sequence[int]]) -> None:
        self.parts = parts

    def __call__(self, passed: Pass) -> tuple[Tensor, Tensor]:
        return _all(motion_loss(passed.clean, passed.batch["clean"], self.parts))


class SampledMotionLoss:
    """That a sampled clip moves as the base's."""

    name, weight = "sampled_motion_loss", MOTION_WEIGHT

    def __init__(self, parts: Sequence[Sequence[int]], base: GuidedBase) -> None:
        self.parts, self.base = parts, base

    def __call__(self, passed: Pass) -> tuple[Tensor, Tensor]:
        low = passed.batch["timestep"] < MOTION_FROM
        return _all(torch.where(low, MOTION_BELOW, 1) * motion_loss(passed.clean, self.base(passed), self.parts))


class MeanFrameLoss:
    """That a sampled clip looks like the training clip: how it moves is one way of many to follow the prompt."""

    name, weight = "clean_loss", CLEAN_WEIGHT

    def __call__(self, passed: Pass) -> tuple[Tensor, Tensor]:
        rows = (passed.batch["timestep"] >= CLEAN_FROM).nonzero()[:, 0]
        apart = (passed.clean - passed.batch["clean"])[rows].mean(dim=1)
        return rows, apart.square().flatten(1).mean(dim=1)


class PoseLoss:
    """How the head is held, whosever it is."""

    name, weight = "pose_loss", 1.0

    def __init__(self, judge: RenderedJudge, base: GuidedBase) -> None:
        self.judge, self.base = judge, base

    def __call__(self, passed: Pass) -> tuple[Tensor, Tensor]:
        return _all(self.judge.of_clips(passed.clean, self.base(passed), passed.batch["row"]))


class TwoRecognisers(IdentityLoss):
    """The cosine from where rendered faces have their mean, and what a recogniser of rendered people says."""

    def __init__(self, plain: IdentityLoss, centre: Tensor, judge: RenderedJudge) -> None:
        super().__init__(plain.weight, plain.vae, plain.recogniser, plain.detector, plain.first)
        self.centre, self.judge = centre, judge

    def compare(self, frames: Tensor, landmarks: Tensor, target: Tensor, samples: Tensor) -> Tensor:
        loss = centred_identity_loss(frames, landmarks, target, self.recogniser, self.centre)
        return loss + self.judge.of_faces(frames, landmarks, samples) / self.weight


def mean_embedding(features: Features) -> Tensor:
    """(512,), of all photos, each of length 1."""
    photos = [features.reference(number)["embedding"].float() for number in range(len(features.references))]
    return F.normalize(torch.stack(photos), dim=-1).mean(dim=0)


def _all(values: Tensor) -> tuple[Tensor, Tensor]:
    return torch.arange(len(values), device=values.device), values
