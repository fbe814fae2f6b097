"""What other nodes may hand to those that look at faces, on the way to photos; no ComfyUI, no models."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mm_core.picture_file import read_image

ROOT = Path(__file__).resolve().parents[2]
RGB = torch.rand(1, 40, 30, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def convert() -> ModuleType:
    """nodes/convert.py, which imports relatively."""
    pack = sys.modules.setdefault("magic_mirror_pack", ModuleType("magic_mirror_pack"))
    pack.__path__ = [str(ROOT)]
    return import_module("magic_mirror_pack.nodes.convert")


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (RGB[:0], "the batch of pictures is empty: 0 pictures"),
        (RGB[..., :1], "have 1 channels; 3 .RGB. or 4"),
        (RGB[..., :2], "have 2 channels"),
        (RGB[..., 0], r"not what is connected, of shape \(1, 40, 30\). A mask becomes"),
        ([1, 2], "a list"),
        (RGB[:, :0, :0], "picture 1 is 0 x 0 px: it has no pixels"),
        (RGB * torch.nan, r"picture 1 has values that are no numbers"),
        (RGB / 0, r"picture 1 has values that are no numbers"),
        (torch.zeros(1, 1, 1, 3).expand(1, 11_000, 10_000, 3), "10000 x 11000 px, more than the 100 megapixels"),
    ],
)
def test_what_is_no_picture(convert: ModuleType, batch: Tensor, message: str) -> None:
    errors = import_module("magic_mirror_pack.mm_core.errors")
    with pytest.raises(errors.MagicMirrorError, match=message):
        list(convert.photos_from_images([None, batch]))


def test_a_cut_out_is_the_picture_that_the_command_line_reads(convert: ModuleType, tmp_path: Path) -> None:
    """By its fourth channel, and by the mask that core's Load Image makes of it."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 4), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "cut_out.png")
    expected = read_image(tmp_path / "cut_out.png")
    rgba = torch.from_numpy(pixels)[None].float() / 255
    (by_channel,) = convert.photos_from_images([rgba])
    (by_mask,) = convert.photos_from_images([rgba[..., :3]], [1 - rgba[..., 3]])
    assert np.array_equal(by_channel, expected) and np.array_equal(by_mask, expected)
    (whole,) = convert.photos_from_images([rgba[..., :3]], [torch.zeros(1, 64, 64)])  # Load Image's, without alpha
    assert np.array_equal(whole, pixels[..., :3])
    errors = import_module("magic_mirror_pack.mm_core.errors")
    with pytest.raises(errors.MagicMirrorError, match=r"mask of picture 1 has the shape \(64, 64\), its picture \(40"):
        list(convert.photos_from_images([rgba[..., :3]], [torch.ones(1, 64, 64)]))
