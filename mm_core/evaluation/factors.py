"""Modulation analysis (paper, Fig. 13): where the scale factors of video, text and face lie, by layer and time step.

In their principal components, not by t-SNE: those that the picture does not show are in the table, for any t-SNE.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..errors import MagicMirrorError, SettingError
from ..files import atomic_write
from ..hosts.cogvideox_diffusers import HOST
from ..pipelines.conditioning import precompute_factors
from ..pipelines.identity import Identity
from ..pipelines.magic_mirror import MagicMirror

MODALITIES = ("video", "text", "face")
COMPONENTS = 50  # in the table: what t-SNE is usually given
_SCALES = [1, 4]  # of shift, scale and gate, before attention and before the feed-forward


@dataclass(frozen=True, kw_only=True, eq=False)
class ScaleFactors:
    """N = 3 modalities x A adapted layers x T time steps.

    vectors: (N, 2 D), the scales before attention and before the feed-forward, as the blocks apply them, with CAN's
    residuals. labels: by `modality`, `layer` and `time step`, (N,) ints; a modality is an index of MODALITIES.
    """

    vectors: np.ndarray
    labels: dict[str, np.ndarray]

    def components(self) -> tuple[np.ndarray, np.ndarray]:
        """Coordinates along the principal components, (N, N), largest first, and their parts of the variance, (N,)."""
        centred = self.vectors - self.vectors.mean(axis=0)
        values, vectors = np.linalg.eigh(centred @ centred.T)
        values = values[::-1].clip(0)
        return vectors[:, ::-1] * np.sqrt(values), values / values.sum()

    def explained(self) -> dict[str, float]:
        """The part of the variance that lies between the groups of each label, 0 to 1."""
        centred = self.vectors - self.vectors.mean(axis=0)

        def between(label: np.ndarray) -> float:
            groups = [centred[label == value] for value in np.unique(label)]
            return sum(len(group) * float((group.mean(axis=0) ** 2).sum()) for group in groups)

        return {name: between(label) / float((centred**2).sum()) for name, label in self.labels.items()}


@torch.no_grad()
def scale_factors(mirror: MagicMirror, identity: Identity, steps: int) -> ScaleFactors:
    """Of an adapter on its base, for a person and a schedule of so many steps. Raises SettingError without an adapter.
    """
    attached = mirror.loaded.attached
    if attached is None:
        raise SettingError("The model has no adapter, and so no factors of its own: give one")
    transformer, adapter = attached.transformer, attached.adapter
    scheduler = mirror.base.load_scheduler()
    scheduler.set_timesteps(steps)
    timesteps, layers = scheduler.timesteps, adapter.config.adapted_layers
    id_embedding = adapter.id_embedding(identity.id_tokens.to(mirror.dtype))
    added = precompute_factors(attached, id_embedding, timesteps, torch.device("cpu"))
    temb = HOST.time_embedding(transformer, timesteps, mirror.dtype)  # (T, Dt)
    blocks = HOST.blocks(transformer)
    base = torch.stack([HOST.parts(blocks[layer]).modulation(temb) for layer in layers], dim=1)  # (T, A, 2, 6, D)
    video_and_text = base + added.can.unflatten(2, (2, 6))
    factors = torch.cat([video_and_text, added.face[:, :, None]], dim=2)  # (T, A, 3, 6, D)
    vectors = factors[:, :, :, _SCALES].flatten(3).float()
    grid = np.meshgrid(timesteps.numpy(), np.array(layers), np.arange(len(MODALITIES)), indexing="ij")
    labels = {name: part.ravel() for name, part in zip(("time step", "layer", "modality"), grid)}
    return ScaleFactors(vectors=vectors.flatten(0, 2).numpy(), labels=labels)


def write_factors(factors: ScaleFactors, picture: Path) -> list[Path]:
    """A picture of the first two components, and a CSV beside it with COMPONENTS of them. Raises MagicMirrorError.

    picture: its ending is a format of matplotlib's, such as .png or .svg.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MagicMirrorError("The picture needs matplotlib: python -m pip install matplotlib") from error
    points, parts = factors.components()
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    for axes, (name, label) in zip(figure.subplots(1, 3), reversed(factors.labels.items())):
        axes.set(title=name, xlabel=f"component 1 ({parts[0]:.0%} of variance)", ylabel=f"component 2 ({parts[1]:.0%})")
        if name != "modality":
            figure.colorbar(axes.scatter(*points[:, :2].T, c=label, s=8), ax=axes)
            continue
        for number, modality in enumerate(MODALITIES):
            axes.scatter(*points[label == number, :2].T, s=8, label=modality)
        axes.legend()
    format = picture.suffix[1:]
    if format not in figure.canvas.get_supported_filetypes():
        raise SettingError(f"{picture.name} has no ending of a picture: call it {picture.stem}.png")
    table = picture.with_suffix(".csv")
    with atomic_write(picture) as temporary:
        figure.savefig(temporary, format=format, dpi=120)
    with atomic_write(table) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        columns = points[:, :COMPONENTS].astype(np.float32)
        labels = factors.labels | {"modality": np.array(MODALITIES)[factors.labels["modality"]]}
        writer.writerow([*labels, *(f"component {number + 1}" for number in range(columns.shape[1]))])
        writer.writerows([*own, *row] for *own, row in zip(*labels.values(), columns))
    return [picture, table]
