"""A face recogniser that gradients can pass through, and the alignment in front of it (paper Sec. 3.4, identity loss).

The numbers are insightface's own: the same weights, the same crop, the same normalisation. What is new is only that
torch computes them, so that the loss reaches the pixels of the generated frames.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CheckpointError, MagicMirrorError

if TYPE_CHECKING:
    from onnx import ModelProto

ALIGNED_SIZE = 112  # pixels: the aligned crop that ArcFace sees
EMBEDDING_SIZE = 512

# Where ArcFace wants the five landmarks in a 112 px crop, x y: insightface.utils.face_align.arcface_dst.
LANDMARK_TEMPLATE = (
    (38.2946, 51.6963),  # eye on the picture's left
    (73.5318, 51.5014),  # eye on its right
    (56.0252, 71.7366),  # nose tip
    (41.5493, 92.3655),  # mouth corners
    (70.7299, 92.2041),
)
MIN_SPREAD = 1.0  # px^2, sum of the landmarks' squared distances to their centre: less is no face
PIXEL_MEAN, PIXEL_SCALE = 127.5, 127.5  # of 0..255
# insightface recognises networks that normalise by themselves by nodes of these names among the first few.
FIRST_NODES = 8
SUBTRACTS, MULTIPLIES = ("Sub", "_minus"), ("Mul", "_mul")


class DifferentiableArcFace(nn.Module):
    """A recogniser of insightface, such as `w600k_r50`, as a frozen torch module.

    It stays in evaluation mode whatever it is asked for: its batch norms would otherwise use the statistics of the
    batch and overwrite their own, for good, in a single pass. Autocast is off inside.

    path: the recognition model of a pack, in the format of onnx.

    Raises CheckpointError where the file is missing, damaged or no recogniser, MagicMirrorError where onnx2torch
    cannot be imported.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        path = Path(path).expanduser()
        if not path.is_file():
            raise CheckpointError(
                f"the face recogniser {path} is missing: give the recognition .onnx of an insightface pack, such as "
                "w600k_r50.onnx of buffalo_l or glintr100.onnx of antelopev2, licensed for non-commercial research"
            )
        self.network, normalises_itself = _convert(path)
        self.mean, self.scale = (0.0, 1.0) if normalises_itself else (PIXEL_MEAN, PIXEL_SCALE)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> DifferentiableArcFace:
        """A frozen judge has no training mode."""
        return super().train(False)

    def forward(self, faces: Tensor) -> Tensor:
        """Aligned faces, (B, 3, 112, 112) RGB from 0 to 1, to embeddings, (B, 512), not normalised.

        These are of the dtype of the network.
        """
        if faces.shape[1:] != (3, ALIGNED_SIZE, ALIGNED_SIZE):
            raise ValueError(
                f"the recogniser wants (B, 3, {ALIGNED_SIZE}, {ALIGNED_SIZE}) aligned faces, not {tuple(faces.shape)}: "
                "use align_faces"
            )
        dtype = next(self.network.parameters()).dtype
        with torch.autocast(faces.device.type, enabled=False):
            return self.network((faces.to(dtype) * 255 - self.mean) / self.scale)


def align_faces(frames: Tensor, landmarks: Tensor, size: int = ALIGNED_SIZE) -> Tensor:
    """Turn, scale and shift each face onto ArcFace's template, as insightface.utils.face_align.norm_crop does.

    Like there, sampling is bilinear without antialiasing and black outside the picture: a smoother crop would be
    another input than the one the recogniser's embeddings are compared in.

    Args:
        frames: (B, 3, H, W), any range; gradients flow to them.
        landmarks: (B, 5, 2), x y in pixels of the frames, pixel centres at whole numbers, ordered as in
            `faces.analysis.Face`. Constants: no gradient flows to them.
        size: side of the result in pixels. The template grows with it.

    Returns:
        (B, 3, size, size) in the frames' dtype, float32 at least.
    """
    if frames.ndim != 4 or landmarks.shape != (len(frames), len(LANDMARK_TEMPLATE), 2):
        raise ValueError(
            f"align_faces wants frames (B, 3, H, W) and landmarks (B, 5, 2), not {tuple(frames.shape)} and "
            f"{tuple(landmarks.shape)}: pass one face for each frame"
        )
    frames = frames.to(torch.promote_types(frames.dtype, torch.float32))
    landmarks = landmarks.detach().to(frames)
    template = landmarks.new_tensor(LANDMARK_TEMPLATE) * (size / ALIGNED_SIZE)
    turn, shift = _similarity(landmarks, template)

    steps = torch.arange(size, dtype=frames.dtype, device=frames.device)
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    source = (torch.complex(x, y) - shift[:, None, None]) / turn[:, None, None]  # (B, size, size), pixels of frames
    height, width = frames.shape[-2:]
    # grid_sample without align_corners counts from -1 at a picture's outer edge to 1: half a pixel before its centre.
    grid = torch.stack([(2 * source.real + 1) / width - 1, (2 * source.imag + 1) / height - 1], dim=-1)
    return F.grid_sample(frames, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _similarity(points: Tensor, template: Tensor) -> tuple[Tensor, Tensor]:
    """The similarity from (B, 5, 2) points to the (5, 2) template in least squares, as complex (B,) turn and shift.

    `template ~ turn * points + shift` with x + iy for a point: rotation and scale are one complex factor, and Umeyama's
    solution in the plane is a linear regression.
    """
    points, template = torch.view_as_complex(points.contiguous()), torch.view_as_complex(template)
    centre, target = points.mean(dim=-1, keepdim=True), template.mean()
    offsets = points - centre
    spread = offsets.abs().square().sum(dim=-1)
    if not ((spread > MIN_SPREAD) & spread.isfinite()).all():
        raise ValueError(
            f"landmarks must be finite and spread over more than {MIN_SPREAD} px^2, not {spread.tolist()}: "
            "drop frames without a real face beforehand"
        )
    turn = (offsets.conj() * (template - target)).sum(dim=-1) / spread
    return turn, target - turn * centre[:, 0]


def _convert(path: Path) -> tuple[nn.Module, bool]:
    """The recogniser as a torch module, and whether it normalises pixels of 0..255 by itself."""
    onnx, onnx2torch = _import_converter()
    try:
        model = onnx.load(str(path))
    except Exception as error:  # protobuf's, onnx's and the system's errors share no base class
        raise CheckpointError(
            f"the face recogniser {path} cannot be read ({error}): download its pack again"
        ) from error
    _check_recogniser(model, path)
    try:
        network = onnx2torch.convert(model)
    except NotImplementedError as error:
        raise CheckpointError(
            f"the face recogniser {path} holds an operation that onnx2torch cannot convert ({error}): use w600k_r50 of "
            "buffalo_l or glintr100 of antelopev2"
        ) from error
    names = [node.name for node in model.graph.node[:FIRST_NODES]]
    starts = [any(name.startswith(prefixes) for name in names) for prefixes in (SUBTRACTS, MULTIPLIES)]
    return network, all(starts)


def _import_converter() -> tuple[ModuleType, ModuleType]:
    """The modules onnx and onnx2torch."""
    try:
        import onnx
        import onnx2torch
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision built for another torch
        raise MagicMirrorError(
            f"the identity loss needs onnx2torch ({error}). Install it: python -m pip install onnx2torch. "
            "It imports torchvision, which must be the release that belongs to the installed torch"
        ) from error
    return onnx, onnx2torch


def _check_recogniser(model: ModelProto, path: Path) -> None:
    """Raise CheckpointError unless the network turns (B, 3, 112, 112) into (B, 512)."""
    weights = {tensor.name for tensor in model.graph.initializer}  # old files list these among the inputs
    inputs = [_shape(value) for value in model.graph.input if value.name not in weights]
    outputs = [_shape(value) for value in model.graph.output]
    wanted_in, wanted_out = [3, ALIGNED_SIZE, ALIGNED_SIZE], [EMBEDDING_SIZE]
    if [shape[1:] for shape in inputs] != [wanted_in] or [shape[1:] for shape in outputs] != [wanted_out]:
        raise CheckpointError(
            f"{path} is no ArcFace recogniser: it turns {inputs} into {outputs}, not (B, 3, {ALIGNED_SIZE}, "
            f"{ALIGNED_SIZE}) into (B, {EMBEDDING_SIZE}). Give the recognition file of a pack, such as w600k_r50.onnx"
        )


def _shape(value: object) -> list[int | str]:
    """Sizes of an ONNX input or output; a free size is given by its name."""
    return [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
