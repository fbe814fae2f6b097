"""How a clip moves, as a loss: what the noise loss hardly sees of it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

STILLNESS = 0.006
"""Mean square of what changes in the latents, of unit size, of a clip in which only the light moves (measured on the
small model's). A face that turns is at 0.08, one that tilts at 0.04, one that smiles at 0.009."""


def motion_loss(
    predicted: Tensor, clean: Tensor, windows: Sequence[Sequence[int]] = (), window_weight: float = 1.0
) -> Tensor:
    """The share of a clip's motion that predicted clean latents have wrong: (B,), 0 for single pictures.

    Motion is what differs from the mean over frames. It is a small part of the latents, which the noise loss hardly
    sees; and by its share a smile counts as much as a turn of the head.

    Args:
        predicted, clean: (B, F, C, H, W).
        windows: from one row to another, from one column to another: parts whose own shares are added, each times
            window_weight.
    """
    parts = [
        motion_loss(predicted[..., top:bottom, left:right], clean[..., top:bottom, left:right])
        for top, bottom, left, right in windows
    ]
    moved, wanted = (latents - latents.mean(dim=1, keepdim=True) for latents in (predicted, clean))
    wrong, whole = (motion.square().flatten(1).mean(dim=1) for motion in (moved - wanted, wanted))
    return wrong / (whole + STILLNESS) + window_weight * sum(parts)
