"""Networks of insightface's packs as torch modules, which gradients can pass through."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from torch import nn

from ..errors import CheckpointError, MagicMirrorError

if TYPE_CHECKING:
    from onnx import ModelProto


def load_network(
    path: Path, what: str, instead: str, check: Callable[[ModelProto, Path], None]
) -> tuple[nn.Module, ModelProto]:
    """The network in an ONNX file, and the file's own description of it.

    Args:
        what, instead: for errors, such as "face recogniser" and "w600k_r50.onnx of buffalo_l".
        check: raises CheckpointError if it is another network.

    Raises CheckpointError where the file is missing, damaged or cannot be converted, MagicMirrorError where onnx2torch
    cannot be imported.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise CheckpointError(
            f"the {what} {path} is missing: give that of an insightface pack, such as {instead}, licensed for "
            "non-commercial research"
        )
    onnx, onnx2torch = _import_converter()
    try:
        model = onnx.load(str(path))
    except Exception as error:  # protobuf's, onnx's and the system's errors share no base class
        raise CheckpointError(f"the {what} {path} cannot be read ({error}): download its pack again") from error
    check(model, path)
    try:
        return onnx2torch.convert(model), model
    except NotImplementedError as error:
        raise CheckpointError(
            f"the {what} {path} holds an operation that onnx2torch cannot convert ({error}): use {instead}"
        ) from error


def shape_of(value: object) -> list[int | str]:
    """Sizes of an ONNX input or output; a free size is given by its name."""
    return [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]


def _import_converter() -> tuple[ModuleType, ModuleType]:
    """The modules onnx and onnx2torch."""
    try:
        import onnx
        import onnx2torch
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision built for another torch
        raise MagicMirrorError(
            f"losses on faces need onnx2torch ({error}). Install it: python -m pip install onnx2torch. "
            "It imports torchvision, which must be the release that belongs to the installed torch"
        ) from error
    return onnx, onnx2torch
