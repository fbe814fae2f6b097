"""The adapter's two stages as tasks of the loop: which samples, which noise, what is dropped, what is written."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers import CogVideoXDDIMScheduler
from torch import Tensor, nn

from ..checkpoints.adapter_file import Trained, load_adapter, save_adapter
from ..data.features import INDEX, Features
from ..errors import SettingError
from ..faces.arcface import DifferentiableArcFace
from ..limits import NAME_LENGTH
from ..memory import store_in_fp8
from ..models.adapter import MagicMirrorAdapter
from ..pipelines.base import BaseModel
from ..pipelines.control import AdapterSettings
from ..pipelines.named import base_of
from ..pipelines.presets import TEMPORAL_COMPRESSION, spatial_compression
from .config import ABLATIONS, TrainingConfig, adapter_config
from .diffusion import add_noise, alphas_bar, rotary_embedding
from .loop import train
from .losses import face_area
from .randomness import generator_for, shuffled
from .rollouts import Rollouts
from .runs import is_finished, latest_checkpoint
from .sample_losses import IdentityLoss, NoiseLoss, SampleLoss
from .sources import face_analyzer, features_of, output_of, recogniser_file
from .step import AdapterTraining
from .task import Task
from .validation import validate

_log = logging.getLogger(__name__)

ADAPTER_FILE = "adapter.safetensors"


class AdapterTask(Task):
    """A stage on precomputed features.

    start: the adapter of the stage before; its optimizer's state is not taken over.

    Raises:
        CheckpointError: features missing or made for another base; SettingError: no recogniser for the identity loss.
    """

    def __init__(self, config: TrainingConfig, stage: str, start: Path | None = None) -> None:
        self.config, self.name = config, stage
        self.stage = config.stage(stage)
        self.base = self.open_base()
        self.features = Features.open(features_of(config, stage))
        self.training, self.validation = self.features.split(config.validation_people, self._scored_people())
        # Without the text encoder: its work is in the features.
        pipe = self.pipe = self.base.load(self.stage.loop.dtype, text_encoder=False)
        if config.fp8_base:
            store_in_fp8(pipe.transformer, None, self.stage.loop.dtype)
        adapter = self._adapter(start)
        if config.gradient_checkpointing:
            pipe.transformer.enable_gradient_checkpointing()
            pipe.vae.enable_gradient_checkpointing()
        scheduler = CogVideoXDDIMScheduler.from_config(pipe.scheduler.config)
        self.alphas_bar = alphas_bar(scheduler)
        if (sampling := self.stage.sampling) is not None:  # clips in the making, which a resumed run needs
            self.state = Rollouts(sampling, scheduler, self.stage.loop.batch_size, self.stage.identity_start)
        frames, _, height, width = self.features.sample(0)["latents"].shape
        # CogVideoX 1.5 patches in time: a clip's first latent frame is repeated until they are whole.
        self.padding = -frames % (pipe.transformer.config.patch_size_t or 1)
        settings = AdapterSettings(**ABLATIONS[config.ablation])
        self.model = AdapterTraining(pipe.transformer, adapter, settings, *self.losses())
        self.cell = spatial_compression(pipe.vae.config)
        self.rotary = rotary_embedding(pipe.transformer, self.padding + frames, height, width)

    def _scored_people(self) -> list[str]:
        """Those whom the video stage leaves out, of whom the adapter is scored in the end: not always those of this
        stage, since either may have lost people for want of a face."""
        folder, count = features_of(self.config, "video"), self.config.validation_people
        if self.name == "video" or not count:
            return []
        if not (folder / INDEX).is_file():
            _log.warning("%s has no features yet: whom the video stage leaves out may be trained on here", folder)
            return []
        return Features.open(folder).last_people(count)

    @property
    def compiled(self) -> nn.Module:
        """Only the transformer: how many samples are judged differs from step to step and would compile all anew."""
        return self.model.transformer

    def open_base(self) -> BaseModel:
        return base_of(self.config.base)

    def losses(self) -> tuple[Sequence[SampleLoss], Rollouts | None, Sequence[SampleLoss]]:
        """Of noised training samples; the clips that the model samples itself; and of those. Here, the paper's."""
        if not self.stage.identity_weight:
            return [NoiseLoss()], None, []
        identity = self.identity_loss()
        return ([NoiseLoss(), identity], None, []) if self.state is None else ([NoiseLoss()], self.state, [identity])

    def identity_loss(self) -> IdentityLoss:
        recogniser = DifferentiableArcFace(recogniser_file(self.config))
        detector = None
        if self.state is not None:
            detector = face_analyzer(self.config)
        vae = self.pipe.vae.requires_grad_(False)
        return IdentityLoss(self.stage.identity_weight, vae, recogniser, detector, self.padding)

    @property
    def settings(self) -> dict[str, Any]:
        """What the numbers of a run depend on, beside the loop's settings and where files are."""
        config, stage, trained = self.config, asdict(self.stage), set(self.training.tolist())
        for name in ("loop", "data", "features"):
            del stage[name]
        return stage | dict(
            stage=self.name, base=self.base.name, ablation=config.ablation, adapter=self.model.adapter.config.to_dict(),
            fp8_base=config.fp8_base, face_pack=config.face_pack, start=self._start, samples=len(self.features.entries),
            held_out=[entry["id"] for row, entry in enumerate(self.features.entries) if row not in trained],
            **{f"features.{name}": value for name, value in self.features.settings.items()},
        )  # fmt: skip

    def _adapter(self, start: Path | None) -> MagicMirrorAdapter:
        self._start = None
        if start is not None:
            adapter, header = load_adapter(start)
            self._start = asdict(header.trained)
            return adapter.float()
        torch.manual_seed(self.stage.loop.seed)
        return MagicMirrorAdapter(adapter_config(self.config, self.base.name, self.base.transformer_config))

    def batch(self, samples: range) -> dict[str, Any]:
        """As `AdapterTraining.forward` takes it."""
        drawn = [self.draw(self.training[shuffled(n, len(self.training), self._seed)], n) for n in samples]
        batch = self.stacked(drawn)
        if self.stage.identity_weight:
            acts = samples.start // self.stage.loop.batch_size >= self.stage.identity_start
            batch |= self._judged(drawn if acts and self.state is None else [])
            if acts and self.state is not None:
                batch["rollout"] = self._rollout(samples)
        return batch

    @property
    def _seed(self) -> int:
        return self.stage.loop.seed

    def stacked(self, drawn: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """What `draw` gives of several samples as a batch, without what the identity loss needs."""
        batch = {name: torch.stack([sample[name] for sample in drawn]) for name in drawn[0] if name not in _JUDGED}
        batch["noisy"] = add_noise(batch["clean"], batch["noise"], batch["alpha_bar"])
        if self.rotary is not None:
            batch["cos"], batch["sin"] = self.rotary
        return batch

    def _rollout(self, samples: range) -> dict[str, Any]:
        """The clips that are being sampled beside these samples; each keeps its prompt, and sees one photo."""
        drawn = []
        for number in samples:
            began = self.state.progress(number)[1]
            row = self.training[shuffled(began, len(self.training), self._seed)]
            sample = self.draw(row, began, whole=True)
            sample["timestep"] = timestep = self.state.timestep(number)
            sample["alpha_bar"] = self.alphas_bar[timestep]
            generator = generator_for(self._seed, number, 2)
            sample["judged_frame"] = torch.randint(self.padding, len(sample["clean"]), (), generator=generator)
            drawn.append(sample)
        own = {"numbers": list(samples), "negative": self.features.empty.float()}
        return self.stacked(drawn) | self._judged(drawn) | own

    def draw(self, row: int, number: int, whole: bool = False) -> dict[str, Tensor]:
        """A row of the features with all that is random about it, from the sample's number.

        whole: the prompt is kept, all of the frame counts, and one photo is seen.
        """
        stage, generator = self.stage, generator_for(self._seed, number)
        sample = self.features.sample(row)
        timestep = torch.randint(1000, (), generator=generator)
        dropped, area = (torch.rand(2, generator=generator) + whole).tolist()
        clean = self._padded(sample["latents"].float())
        frames, _, height, width = clean.shape
        mask = torch.ones(frames, 1, height, width)
        if area < stage.face_area:
            mask = self._padded(face_area(sample["boxes"][None], height, width, self.cell)[0])
        references = self._references(sample["references"], number, generator)[: 1 if whole else None]
        return {
            "row": torch.tensor(int(row)),
            "clean": clean,
            "noise": torch.randn(clean.shape, generator=generator),
            "timestep": timestep,
            "alpha_bar": self.alphas_bar[timestep],
            "text": (self.features.empty[0] if dropped < stage.text_dropout else sample["prompt_embeds"]).float(),
            "slots": sample["slots"].long(),
            "has_text": torch.tensor(dropped >= stage.text_dropout),
            "face_mask": mask,
            "id_tokens": torch.stack([r["id_tokens"] for r in references]).float(),
            "structure_tokens": torch.stack([r["structure_tokens"] for r in references]).float(),
            "target": torch.stack([r["embedding"] for r in references]).mean(dim=0),
            "landmarks": sample["landmarks"],
            "judged_frame": self._shown(sample["seen"], generator),
        }

    def _shown(self, seen: Tensor, generator: torch.Generator) -> Tensor:
        """(), one of the latent frames in which a face was found."""
        frames = seen.nonzero()[:, 0]
        return self.padding + frames[torch.randint(len(frames), (), generator=generator)]

    def _padded(self, frames: Tensor) -> Tensor:
        return torch.cat([frames[:1].expand(self.padding, -1, -1, -1), frames])

    def _references(self, known: list[int], number: int, generator: torch.Generator) -> list[dict[str, Tensor]]:
        """Photos of the person. Their number is drawn for the whole step, so that the step's samples stack."""
        step = number // self.stage.loop.batch_size
        of_step = generator_for(self._seed, step, 1)
        count = int(torch.randint(self.stage.max_references, (), generator=of_step))
        order = torch.randperm(len(known), generator=generator).tolist()
        return [self.features.reference(known[order[i % len(order)]]) for i in range(count + 1)]

    def _judged(self, drawn: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The samples that the identity loss acts on. Landmarks are the training clip's."""
        low, high = self.stage.identity_timesteps
        rows = [row for row, sample in enumerate(drawn) if low <= int(sample["timestep"]) < high]
        chosen = [drawn[row] for row in rows]
        # A latent frame holds four frames, of which the last is judged; the first one holds only the first.
        landmarks = [s["landmarks"][(int(s["judged_frame"]) - self.padding) * TEMPORAL_COMPRESSION] for s in chosen]
        return {
            "judged": torch.tensor(rows, dtype=torch.long),
            "judged_frame": torch.tensor([int(s["judged_frame"]) for s in chosen], dtype=torch.long),
            "landmarks": torch.stack(landmarks) if chosen else torch.zeros(0, 5, 2),
            "target": torch.stack([s["target"] for s in chosen]) if chosen else torch.zeros(0, 512),
        }

    def export(self, weights: Mapping[str, Tensor], path: Path, step: int) -> None:
        """`adapter.safetensors`, with what it was trained on in its header."""
        adapter = self.model.adapter
        mine = {name.removeprefix("adapter."): tensor for name, tensor in weights.items()}
        whole = MagicMirrorAdapter(adapter.config)
        whole.load_state_dict(adapter.state_dict() | mine)
        data = f"{len(self.training):,} samples of {Path(self.stage.data).name}; licences: {self.features.licences}"
        trained = Trained(stage=self.name, steps=step, data=data[:NAME_LENGTH])
        save_adapter(whole, path / ADAPTER_FILE, base_model=self.base.name, trained=trained)

    def exported(self, path: Path) -> dict[str, Tensor]:
        """What `export` was given, from what it wrote: the loop keeps no copy of these weights."""
        adapter = load_adapter(path / ADAPTER_FILE)[0]
        return {f"adapter.{name}": tensor for name, tensor in adapter.state_dict().items()}

    def validate(self, step: int, folder: Path) -> dict[str, float]:
        return validate(self, folder)


_JUDGED = ("target", "landmarks", "judged_frame")


def train_stage(
    config: TrainingConfig, stage: str, start: Path | None = None, task: Callable[..., AdapterTask] = AdapterTask
) -> Path:
    """Train a stage, or the rest of it; returns the adapter file.

    start: the adapter to begin with. The video stage begins with the image stage's result, unless its ablation is G.
    task: AdapterTask, or what is made of it.
    """
    output = output_of(config)
    if start is None and stage == "video" and config.ablation != "G":
        if not is_finished(output / "image", config.image.loop.steps):
            raise SettingError(
                f"The image stage in {output / 'image'} is not finished: run it first, give --start ADAPTER, or leave "
                "it out on purpose with ablation: G."
            )
        start = latest_checkpoint(output / "image") / ADAPTER_FILE
    return train(task(config, stage, start), config.stage(stage).loop, output / stage) / ADAPTER_FILE
