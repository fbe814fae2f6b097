"""The text encoder is read once for all that use it, keeps its prompts, and leaves when it is told to."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerator import simulated
from tiny_models import build_identity, build_pipeline

from mm_core.choices import POLICIES
from mm_core.errors import NumericsError, OutOfMemoryError
from mm_core.memory import size_in_bytes
from mm_core.pipelines.base import FolderBase
from mm_core.pipelines.clip import ClipSettings
from mm_core.pipelines.magic_mirror import MagicMirror

CPU = torch.device("cpu")
CLIP = ClipSettings(prompt="a man img reading", negative_prompt="rain", width=48, height=32, num_frames=1, steps=1)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.dtype]]:
    """Each reading of a text encoder's weights."""
    readings, load = [], FolderBase.load_text_encoder

    def noted(base: FolderBase, dtype: torch.dtype, quantised: str | None) -> torch.nn.Module:
        readings.append(dtype)
        return load(base, dtype, quantised)

    monkeypatch.setattr(FolderBase, "load_text_encoder", noted)
    yield readings


@pytest.fixture
def folder(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A model of its own: those of other tests may have encoders."""
    return Path(shutil.copytree(folders["5b"], tmp_path / "5b"))


def model(folder: Path, adapter: bool = True, **options: str) -> MagicMirror:
    return MagicMirror(
        FolderBase(folder), adapter=folder / "adapter.safetensors" if adapter else None, device=CPU, **options
    )


def test_every_way_to_it_reads_it_once(folder: Path, read: list[torch.dtype]) -> None:
    """Text for the native nodes, a clip, a clip of another prompt, and both by another model with the same files."""
    first, second = model(folder), model(folder, adapter=False)
    first.encode_text("rain")
    first.sample(CLIP, build_identity())
    first.sample(CLIP, None)
    second.encode_text("a woman walks")
    second.sample(CLIP)
    assert read == [torch.float32]


def test_it_goes_with_the_last_model(folder: Path, read: list[torch.dtype]) -> None:
    first = model(folder)
    first.encode_text("rain")
    del first
    gc.collect()
    model(folder).encode_text("rain")
    assert len(read) == 2


def test_other_files_types_and_folders_have_their_own(folder: Path, folders: dict[str, Path]) -> None:
    one = model(folder)
    assert model(folder).text is one.text
    assert model(folder, offload="group").text is not one.text
    assert model(folder, precision="bf16").text is not one.text
    assert model(folders["5b"]).text is not one.text
    path = folder / "text_encoder" / "model.safetensors"
    path.write_bytes(path.read_bytes())
    assert model(folder).text is not one.text


def test_two_base_models_with_one_file_share_it(folder: Path, tmp_path: Path) -> None:
    """As single files do, or folders with a link."""
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    shutil.rmtree(other / "text_encoder")
    (other / "text_encoder").symlink_to(folder / "text_encoder", target_is_directory=True)
    one = model(folder)
    assert model(other).text is one.text


def test_known_prompts_need_no_encoder(folder: Path, read: list[torch.dtype]) -> None:
    """A model whose prompts the process has seen loads half as much."""
    first = model(folder)
    latents = first.sample(CLIP, build_identity())
    second = model(folder)
    second.text._module = None
    assert torch.equal(second.sample(CLIP, build_identity()), latents)
    assert len(read) == 1


def test_the_same_embeddings_as_diffusers(folder: Path) -> None:
    pipe = build_pipeline("5b")
    with torch.no_grad():
        expected, _ = pipe.encode_prompt("a man reading", do_classifier_free_guidance=False, max_sequence_length=24)
    assert torch.equal(model(folder).encode_text("a man reading"), expected)


@pytest.mark.parametrize("policy", POLICIES)
def test_where_it_rests(folder: Path, policy: str) -> None:
    """On the device, or in main memory, from where it comes whole or layer by layer; it gives the same."""
    expected = model(folder).encode_text("rain")
    with simulated() as accelerator:
        mirror = MagicMirror(FolderBase(folder), precision="fp32", offload=policy, device=accelerator.device)
        torch.testing.assert_close(mirror.encode_text("rain"), expected)
        rest = {"none": accelerator.device, "model": CPU}.get(policy, torch.device("meta"))
        assert {weight.device for weight in mirror.text.module.parameters()} == {rest}
        before = accelerator.traffic["to device"]
        mirror.encode_text("rain")
        assert accelerator.traffic["to device"] == before


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_its_size_is_known_before_it_is_read(folder: Path, read: list[torch.dtype], precision: str) -> None:
    mirror = model(folder, precision=precision)
    size = mirror.text.size
    assert read == []
    assert size == size_in_bytes(mirror.text.module)


def test_too_little_memory_is_told(folder: Path) -> None:
    with simulated() as accelerator:
        mirror = MagicMirror(FolderBase(folder), precision="fp32", offload="model", device=accelerator.device)
        accelerator.limit_bytes = accelerator.live_bytes + 1000
        with pytest.raises(OutOfMemoryError, match=r"for the text encoder\. Choose group or .*out of memory"):
            mirror.encode_text("rain")
        accelerator.limit_bytes = None
        mirror.encode_text("rain")


def test_an_overflow_is_told_before_sampling(folder: Path) -> None:
    mirror = model(folder, precision="bf16")
    mirror.text.module.encoder.final_layer_norm.weight[0] = float("inf")
    with pytest.raises(NumericsError, match=r"text encoder's embeddings .* in bf16"):
        mirror.sample(CLIP)
    assert "loaded" in vars(mirror)


def test_in_fp16_the_layers_that_overflow_are_wider(folder: Path) -> None:
    """transformers keeps T5's `wo` in float32 then."""
    kept = {name: weight.dtype for name, weight in model(folder, precision="fp16").text.module.named_parameters()}
    wide = {name for name, dtype in kept.items() if dtype == torch.float32}
    assert wide == {name for name in kept if ".wo." in name} and wide
    assert set(kept.values()) == {torch.float16, torch.float32}
