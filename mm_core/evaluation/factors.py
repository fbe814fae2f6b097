"""Modulation analysis (paper, Fig. 13): where the scale factors of video, text and face lie, by layer and time step."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..errors import MagicMirrorError, SettingError
from ..files import atomic_write
from ..hosts.cogvideox_diffusers import HOST
from ..memory import on_device
from ..pipelines.conditioning import precompute_factors
from ..pipelines.identity import Identity
from ..pipelines.lora import Lora
from ..pipelines.magic_mirror import MagicMirror

MODALITIES = ("video", "text", "face")
MAX_STEPS = 100
"""Of 5B, 6,300 points."""
_SCALES = [1, 4]  # of shift, scale and gate, before attention and before the feed-forward
_PERPLEXITY = 30.0  # van der Maaten and Hinton take 5 to 50


@dataclass(frozen=True, kw_only=True, eq=False)
class ScaleFactors:
    """N = 3 modalities x A adapted layers x T time steps.

    vectors: (N, 2 D), the scales before attention and before the feed-forward, as the blocks apply them, with CAN's
    residuals. labels: by `modality`, `layer` and `time step`, (N,) ints; a modality is an index of MODALITIES.
    """

    vectors: np.ndarray
    labels: dict[str, np.ndarray]

    def embedded(self) -> np.ndarray:
        """(N, 2) by t-SNE (van der Maaten and Hinton, 2008): what is near is alike; how far all else is says little."""
        from sklearn.manifold import TSNE

        perplexity = min(_PERPLEXITY, (len(self.vectors) - 1) / 3)
        return TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(self.vectors)

    def explained(self) -> dict[str, float]:
        """The part of the variance that lies between the groups of each label, 0 to 1."""
        centred = self.vectors - self.vectors.mean(axis=0)

        def between(label: np.ndarray) -> float:
            groups = [centred[label == value] for value in np.unique(label)]
            return sum(len(group) * float((group.mean(axis=0) ** 2).sum()) for group in groups)

        return {name: between(label) / float((centred**2).sum()) for name, label in self.labels.items()}

    @property
    def summary(self) -> str:
        """`explained`, as a line."""
        return "of the variance: " + ", ".join(f"{name} {part:.1%}" for name, part in self.explained().items())


@torch.no_grad()
def scale_factors(mirror: MagicMirror, identity: Identity, steps: int, loras: Sequence[Lora] = ()) -> ScaleFactors:
    """Of an adapter on its base, with these LoRAs, for a person and a schedule of so many steps, 1 to MAX_STEPS.

    Raises SettingError for other numbers, and without an adapter; CheckpointError for an identity of another encoder.
    """
    if not 1 <= steps <= MAX_STEPS:
        raise SettingError(f"steps is {steps}; it must be from 1 to {MAX_STEPS}")
    if mirror.header is None:
        raise SettingError("The model has no adapter, and so no factors of its own: give one")
    mirror.checks.of_identity(identity)
    loaded, attached = mirror.loaded, mirror.loaded.attached
    loaded.set_loras(loras)
    transformer, adapter, device = attached.transformer, attached.adapter, loaded.device
    scheduler = mirror.base.load_scheduler()
    scheduler.set_timesteps(steps)
    timesteps, layers = scheduler.timesteps, adapter.config.adapted_layers
    with loaded.transformer.ready():
        with on_device([adapter.id_proj, transformer.time_embedding], device):
            id_embedding = adapter.id_embedding(identity.id_tokens.to(device, mirror.dtype))
            temb = HOST.time_embedding(transformer, timesteps.to(device), mirror.dtype)  # (T, Dt)
        added = precompute_factors(attached, id_embedding, timesteps, device)
        base = []
        for layer in layers:
            block = transformer.transformer_blocks[layer]
            with on_device([block.norm1.linear, block.norm2.linear], device):
                base.append(HOST.parts(block).modulation(temb).cpu())  # (T, 2, 6, D)
    video_and_text = torch.stack(base, dim=1) + added.can.unflatten(2, (2, 6))
    factors = torch.cat([video_and_text, added.face[:, :, None]], dim=2)  # (T, A, 3, 6, D)
    vectors = factors[:, :, :, _SCALES].flatten(3).float()
    grid = np.meshgrid(timesteps.numpy(), np.array(layers), np.arange(len(MODALITIES)), indexing="ij")
    labels = {name: part.ravel() for name, part in zip(("time step", "layer", "modality"), grid)}
    return ScaleFactors(vectors=vectors.flatten(0, 2).numpy(), labels=labels)


def check_drawing() -> None:
    """Raises MagicMirrorError without the packages of `draw_factors`: to be told before a model is loaded."""
    try:
        import matplotlib.figure  # noqa: F401
        import sklearn.manifold  # noqa: F401
    except ImportError as error:
        raise MagicMirrorError(
            f"The picture needs matplotlib and scikit-learn ({error}): python -m pip install matplotlib scikit-learn"
        ) from error


def draw_factors(factors: ScaleFactors) -> tuple[np.ndarray, np.ndarray]:
    """Three plots of the same points, coloured by each label, (H, W, 3) uint8; and the points, (N, 2)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    points = factors.embedded()
    figure = Figure(figsize=(15, 4.5), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    for axes, (name, label) in zip(figure.subplots(1, 3), reversed(factors.labels.items())):
        axes.set(title=name, xticks=[], yticks=[])
        if name != "modality":
            figure.colorbar(axes.scatter(*points.T, c=label, s=8), ax=axes)
            continue
        for number, modality in enumerate(MODALITIES):
            axes.scatter(*points[label == number].T, s=8, label=modality)
        axes.legend()
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy(), points


def write_factors(factors: ScaleFactors, picture: Path) -> list[Path]:
    """`draw_factors` as a PNG, and its points as a CSV beside it."""
    drawn, points = draw_factors(factors)
    table = picture.with_suffix(".csv")
    with atomic_write(picture) as temporary:
        Image.fromarray(drawn).save(temporary, "PNG")
    with atomic_write(table) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        labels = factors.labels | {"modality": np.array(MODALITIES)[factors.labels["modality"]]}
        writer.writerow([*labels, "t-SNE 1", "t-SNE 2"])
        writer.writerows([*own, *point] for *own, point in zip(*labels.values(), points))
    return [picture, table]
