"""Optical flow by RAFT, as VBench measures it, where the user has torchvision and its weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..errors import CheckpointError, MagicMirrorError, reason

MULTIPLE = 8  # pixels: RAFT's feature maps are of an eighth of the size
MIN_SIDE = 128  # pixels: and are halved three times


class Raft:
    """torchvision's raft_small or raft_large with a state dict from a file, on the CPU: a flow function for FlowMeter.

    Raises CheckpointError if the file holds neither, MagicMirrorError where torchvision is missing.
    """

    def __init__(self, file: Path) -> None:
        import torch

        try:
            from torchvision.models.optical_flow import raft_large, raft_small
        except (ImportError, RuntimeError) as error:  # a torchvision of another torch fails when it registers operators
            raise MagicMirrorError(
                f"RAFT needs the torchvision that belongs to the installed torch: {error}"
            ) from error
        try:
            weights = torch.load(file, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, torch.serialization.pickle.UnpicklingError) as error:
            raise CheckpointError(f"{file} cannot be read: {reason(error)}. Download the weights again") from error
        for build in (raft_small, raft_large):
            model = build(weights=None)
            if isinstance(weights, dict) and weights.keys() == model.state_dict().keys():
                model.load_state_dict(weights)
                self._model = model.eval()
                return
        raise CheckpointError(f"{file} is no state dict of torchvision's raft_small or raft_large: give one of the two")

    def __call__(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """(H, W, 2) float32, to the right and down in pixels, of two frames (H, W, 3) uint8; as `optical_flow`."""
        import torch
        from torch.nn.functional import interpolate

        height, width = first.shape[:2]
        size = tuple(max(MIN_SIDE, round(side / MULTIPLE) * MULTIPLE) for side in (height, width))
        frames = torch.from_numpy(np.stack([first, second])).permute(0, 3, 1, 2).float() / 127.5 - 1
        frames = interpolate(frames, size, mode="bilinear")
        with torch.inference_mode():
            flow = self._model(frames[:1], frames[1:])[-1]  # (1, 2, *size), the last refinement
        flow = interpolate(flow, (height, width), mode="bilinear")[0].permute(1, 2, 0).numpy()
        return flow * np.array([width / size[1], height / size[0]], np.float32)
