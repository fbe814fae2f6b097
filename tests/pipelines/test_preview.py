"""Previews of latents: the map of the VAE that ships comes with it, another VAE's is fitted when one is drawn."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerator import simulated
from diffusers import AutoencoderKLCogVideoX
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXEncoder3D
from tiny_models import build_identity, noise

from mm_core.choices import PRECISIONS
from mm_core.pipelines.base import FolderBase, TinyBase
from mm_core.pipelines.clip import ClipSettings
from mm_core.pipelines.magic_mirror import MagicMirror
from mm_core.pipelines.preview import LatentPreview, fit_latent_rgb

CPU = torch.device("cpu")
WIDE_ENOUGH = [precision for precision in PRECISIONS if precision != "nf4"]  # whose groups of 64 are wider than this
CLIP = ClipSettings(prompt="a man img reading", width=48, height=32, num_frames=9, steps=2)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.dtype]]:
    """The types in which a VAE's encoder ran."""
    runs, forward = [], CogVideoXEncoder3D.forward

    def noted(encoder: CogVideoXEncoder3D, sample: torch.Tensor, *args: object, **kwargs: object) -> object:
        runs.append(sample.dtype)
        return forward(encoder, sample, *args, **kwargs)

    monkeypatch.setattr(CogVideoXEncoder3D, "forward", noted)
    yield runs


def model(folder: Path, precision: str) -> MagicMirror:
    return MagicMirror(FolderBase(folder), adapter=folder / "adapter.safetensors", precision=precision, device=CPU)


@pytest.mark.parametrize("precision", WIDE_ENOUGH)
def test_loading_and_sampling_encode_nothing(
    folders: dict[str, Path], encoded: list[torch.dtype], precision: str
) -> None:
    """Whatever the precision: the VAE's encoder takes hours in fp16 on a CPU."""
    mirror = model(folders["5b"], precision)
    mirror.sample(CLIP, build_identity(), on_step=lambda done, steps, preview: None)
    assert encoded == []


@pytest.mark.parametrize("precision", WIDE_ENOUGH)
def test_drawing_fits_once_and_never_in_a_narrow_type_on_a_cpu(
    folders: dict[str, Path], encoded: list[torch.dtype], precision: str
) -> None:
    mirror, sizes = model(folders["5b"], precision), []
    mirror.sample(CLIP, build_identity(), on_step=lambda done, steps, preview: sizes.append(preview().size))
    assert sizes == [(6, 4)] * CLIP.steps
    assert encoded == [torch.float32] * 2  # two batches of pictures
    mirror.sample(CLIP, build_identity(), on_step=lambda done, steps, preview: preview())
    assert len(encoded) == 2


def test_what_ships_needs_no_fit(encoded: list[torch.dtype]) -> None:
    """Its stored map is the fit of its VAE."""
    base = TinyBase()
    vae = base.load_vae(torch.float32)
    fitted = fit_latent_rgb(vae, CPU)
    encoded.clear()
    torch.testing.assert_close(base.latent_rgb, fitted, rtol=0, atol=1e-5)
    LatentPreview(vae, CPU, known=base.latent_rgb).draw(noise(1, 3, 16, 16, 16))
    assert encoded == []


def test_the_fit_is_of_what_the_vae_encodes(folders: dict[str, Path]) -> None:
    """`fit_latent_rgb` runs the encoder itself: the means are those of `vae.encode`."""
    vae = FolderBase(folders["5b"]).load_vae(torch.float32)
    pixels = noise(2, 3, 1, 64, 64)
    with torch.no_grad():
        means = vae.encoder(pixels)[0].chunk(2, dim=1)[0]
        torch.testing.assert_close(means, vae.encode(pixels).latent_dist.mean)


@pytest.mark.parametrize("lend", [False, True], ids=["rests there", "lent"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_device_it_is_fitted_there(folders: dict[str, Path], lend: bool, dtype: torch.dtype) -> None:
    """In the VAE's own type; a VAE that rests on the CPU does so afterwards."""
    base, latents = FolderBase(folders["5b"]), noise(1, 3, 4, 6, 8)
    expected = np.array(LatentPreview(base.load_vae(torch.float32), CPU).draw(latents), dtype=int)
    with simulated() as accelerator:
        device = accelerator.device
        vae: AutoencoderKLCogVideoX = base.load_vae(dtype)
        if not lend:
            vae.to(device)
        seen = []
        vae.encoder.register_forward_pre_hook(lambda _, inputs: seen.append((inputs[0].device, inputs[0].dtype)))
        found = np.array(LatentPreview(vae, device).draw(latents.to(device)), dtype=int)
        assert seen == [(device, dtype)] * 2
        assert {parameter.device for parameter in vae.parameters()} == {CPU if lend else device}
    assert np.abs(found - expected).mean() < (1 if dtype == torch.float32 else 40)


def test_latents_that_are_no_numbers_draw_something() -> None:
    """The error is the sampler's to tell."""
    latents = torch.full((1, 3, 16, 4, 4), float("nan"))
    assert LatentPreview(None, CPU, known=TinyBase().latent_rgb).draw(latents).size == (4, 4)
