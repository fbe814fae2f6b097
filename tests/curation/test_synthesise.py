"""Pairs by PhotoMaker-V2 on SDXL, at tiny random sizes: against the original's steps, and as a user runs it."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerator import Accelerator
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from mm_core.checkpoints.photomaker import save_id_encoder
from mm_core.curation.__main__ import main
from mm_core.curation.items import shards_of
from mm_core.curation.photomaker import BY_TEXT_ALONE, GUIDANCE, NEGATIVE, PhotoMaker, load_photomaker, with_slots
from mm_core.curation.prompts import Prompts
from mm_core.curation.synthesise import Origin, synthesise
from mm_core.data.manifest import PICTURES
from mm_core.errors import NoFaceError, PromptError, SettingError
from mm_core.models.id_encoder import IDEncoder
from mm_core.pipelines.prompt import mark_identity
from mm_core.pipelines.tiny import ID_ENCODER

CPU = torch.device("cpu")
CONFIG = dataclasses.replace(ID_ENCODER, id_token_dim=64, clip_num_layers=2, perceiver_depth=1)
STEPS = 6


def random_sdxl(tokenizer: CLIPTokenizer, tokenizer_2: CLIPTokenizer) -> StableDiffusionXLPipeline:
    text = dict(vocab_size=49408, hidden_size=32, intermediate_size=37, num_attention_heads=4, num_hidden_layers=3)
    text |= dict(bos_token_id=49406, eos_token_id=49407, pad_token_id=1, projection_dim=32)
    torch.manual_seed(0)
    return StableDiffusionXLPipeline(
        vae=AutoencoderKL(
            block_out_channels=[16, 32], down_block_types=["DownEncoderBlock2D"] * 2, norm_num_groups=8,
            up_block_types=["UpDecoderBlock2D"] * 2, latent_channels=4, sample_size=64,
        ),
        text_encoder=CLIPTextModel(CLIPTextConfig(**text)),
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**text)),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=UNet2DConditionModel(
            block_out_channels=(32, 64), layers_per_block=1, sample_size=16, cross_attention_dim=64,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), transformer_layers_per_block=(1, 1),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=(2, 4), norm_num_groups=8,
            use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=80,
        ),
        scheduler=EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
    )  # fmt: skip


def random_lora(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    """As PhotoMaker's, under the names that diffusers gave attention processors then."""
    lora = {}
    for name, layer in unet.named_modules():
        of_attention, _, part = name.rpartition(".to_")
        if of_attention and part in ("q", "k", "v", "out.0"):
            prefix = f"unet.{of_attention}.processor.to_{part.removesuffix('.0')}_lora"
            lora[f"{prefix}.down.weight"] = torch.randn(2, layer.in_features)
            lora[f"{prefix}.up.weight"] = torch.randn(layer.out_features, 2) / 10
    return lora


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory, comfyui_path: Path) -> tuple[Path, Path]:
    """The folder of an SDXL, and PhotoMaker's file for it."""
    folder = tmp_path_factory.mktemp("weights")
    words = comfyui_path / "comfy" / "sd1_tokenizer"  # CLIP's own
    tokenizers = [
        CLIPTokenizer.from_pretrained(words, model_max_length=77, pad_token=pad) for pad in ("<|endoftext|>", "!")
    ]
    pipe = random_sdxl(*tokenizers)
    pipe.save_pretrained(folder / "sdxl")
    torch.manual_seed(1)
    save_id_encoder(IDEncoder(CONFIG), folder / "encoder.safetensors", CONFIG)
    tensors = {f"id_encoder.{key}": tensor for key, tensor in load_file(folder / "encoder.safetensors").items()}
    tensors |= {f"lora_weights.{key}": tensor for key, tensor in random_lora(pipe.unet).items()}
    metadata = {"config": json.dumps(dataclasses.asdict(CONFIG))}
    save_file(tensors, folder / "photomaker-v2.safetensors", metadata)
    return folder / "sdxl", folder / "photomaker-v2.safetensors"


@pytest.fixture(scope="module")
def maker(weights: tuple[Path, Path]) -> PhotoMaker:
    return load_photomaker(*weights, None, CPU, precision="auto", offload="none", steps=STEPS)


def original_text(pipe: StableDiffusionXLPipeline, prompt: str, id_tokens: Tensor, fuse: dict[str, Tensor]) -> list:
    """What the original's pipeline does with a prompt: the text with the person, pooled, and the prompt without."""
    found, plain = [], ""
    for tokenizer, encoder in ((pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2)):
        tokenizer = CLIPTokenizer.from_pretrained(tokenizer.name_or_path, pad_token=tokenizer.pad_token)
        tokenizer.add_tokens(["img"], special_tokens=True)
        trigger = tokenizer.convert_tokens_to_ids("img")
        ids = tokenizer(prompt, padding="max_length", max_length=77, truncation=True).input_ids
        at = ids.index(trigger) - 1
        ids = [*ids[:at], *[ids[at]] * len(id_tokens), *ids[at + 2 :], *[tokenizer.pad_token_id] * 77][:77]
        found.append(encoder(torch.tensor([ids]), output_hidden_states=True))
        plain = plain or tokenizer.decode([i for i in tokenizer(prompt).input_ids[1:-1] if i != trigger])
    text = torch.cat([each.hidden_states[-2] for each in found], dim=-1)

    def normed(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], fuse[f"{name}.weight"], fuse[f"{name}.bias"])

    def mlp(name: str, x: Tensor) -> Tensor:
        x = F.linear(normed(f"{name}.layernorm", x), fuse[f"{name}.fc1.weight"], fuse[f"{name}.fc1.bias"])
        return F.linear(F.gelu(x), fuse[f"{name}.fc2.weight"], fuse[f"{name}.fc2.bias"])

    person = text[0, at : at + len(id_tokens)]
    x = mlp("mlp1", torch.cat([person, id_tokens], dim=-1)) + person
    text[0, at : at + len(id_tokens)] = normed("layer_norm", mlp("mlp2", x) + x)
    return [text, found[1][0], plain]


@torch.no_grad()
def original(maker: PhotoMaker, prompt: str, id_tokens: Tensor, seed: int) -> np.ndarray:
    pipe = maker.pipe
    fuse = {key: tensor for key, tensor in maker.encoder.fuse_module.state_dict().items()}
    with_person, with_person_pooled, plain = original_text(pipe, prompt, id_tokens, fuse)
    text, negative, pooled, negative_pooled = pipe.encode_prompt(plain, negative_prompt=NEGATIVE)
    pipe.scheduler.set_timesteps(STEPS)
    size = pipe.default_sample_size * pipe.vae_scale_factor
    generator = torch.Generator().manual_seed(seed)
    latents = pipe.prepare_latents(1, 4, size, size, text.dtype, CPU, generator)
    times = torch.tensor([[size, size, 0, 0, size, size]] * 2, dtype=text.dtype)
    for step, time_step in enumerate(pipe.scheduler.timesteps):
        late = step > int(BY_TEXT_ALONE * STEPS)
        added = torch.cat([negative_pooled, with_person_pooled if late else pooled])
        seen = pipe.scheduler.scale_model_input(torch.cat([latents] * 2), time_step)
        without, wanted = pipe.unet(
            seen,
            time_step,
            encoder_hidden_states=torch.cat([negative, with_person if late else text]),
            added_cond_kwargs={"text_embeds": added, "time_ids": times},
        ).sample.chunk(2)
        noise = without + GUIDANCE * (wanted - without)
        latents = pipe.scheduler.step(noise, time_step, latents).prev_sample
    picture = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    return ((picture / 2 + 0.5).clamp(0, 1)[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()


@pytest.mark.parametrize("photos", [1, 2])
def test_pictures_are_the_originals(maker: PhotoMaker, photos: int) -> None:
    prompt = "A photograph of an unbelievable ragpicker img, reading; smiling."
    id_tokens = torch.randn(2 * photos, 64, generator=torch.Generator().manual_seed(3))
    found = maker.denoised(mark_identity(prompt), id_tokens, seed=4)
    assert found.shape == (32, 32, 3)
    assert np.array_equal(found, original(maker, prompt, id_tokens, seed=4))
    assert not np.array_equal(found, maker.denoised(mark_identity(prompt), -id_tokens, seed=4))


def test_the_lora_is_in_the_unet(maker: PhotoMaker, weights: tuple[Path, Path]) -> None:
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_out.0.weight"
    plain = UNet2DConditionModel.from_pretrained(weights[0] / "unet").state_dict()[name]
    lora = load_file(weights[1])
    up, down = (lora[f"lora_weights.unet.{name[:-16]}.processor.to_out_lora.{part}.weight"] for part in ("up", "down"))
    torch.testing.assert_close(maker.pipe.unet.state_dict()[name], plain + up @ down)


def test_prompts_fit_and_differ(maker: PhotoMaker) -> None:
    """With the longest parts and the longest word; in each the word is marked, and nothing else is a person."""
    prompts = Prompts()
    assert len(prompts) == 28_800 == len({prompts.prompt(number, "man") for number in range(28_800)})
    longest = max((prompts.prompt(number, "grandmother") for number in range(28_800)), key=len)
    ids, slots = with_slots(maker.pipe.tokenizer_2, mark_identity(longest), 2)
    assert ids[slots] == [ids[slots.start]] * 2 and len(ids) == 77
    with pytest.raises(PromptError, match=r"SDXL reads 77. Shorten it"):
        with_slots(maker.pipe.tokenizer, mark_identity("A man img, " + "again and " * 40), 2)
    for number in range(0, 28_800, 997):
        assert mark_identity(prompts.prompt(number, "person").replace("person img", "wizard img")).noun == "wizard"


@pytest.fixture
def portraits(tmp_path: Path, photographs: Path) -> Path:
    """Two people with a portrait each, a wall, and a file that was cut off."""
    folder = tmp_path / "portraits"
    folder.mkdir()
    for name in ("person_a_1", "person_b_1"):
        (folder / f"{name}.jpg").write_bytes((photographs / f"{name}.jpg").read_bytes())
    (folder / "person_a_1.json").write_text(json.dumps({"caption": "A woman.", "licence": "MIT", "url": "a.example"}))
    (folder / "cut.jpg").write_bytes((folder / "person_b_1.jpg").read_bytes()[:2000])
    Image.new("RGB", (300, 300), (90, 90, 90)).save(folder / "wall.png")
    return folder


class Copier:
    """A generator that returns what it is given."""

    def picture(self, portraits: Sequence[np.ndarray], prompt: str, seed: int) -> np.ndarray:
        if portraits[0].std() < 1:
            raise NoFaceError("no face was found")
        return portraits[0][::2, ::2]


def test_pairs_are_shared_by_processes_and_read_by_the_next_command(tmp_path: Path, portraits: Path) -> None:
    origin = Origin(prompts=Prompts(), each=2, seed=0, generator="a copier")
    outcomes = [synthesise([portraits], tmp_path / "two", Copier, origin, rank=rank, world_size=2) for rank in (0, 1)]
    assert sum(there for there, _ in outcomes) == 4
    assert {name for _, left_out in outcomes for name in left_out} == {"wall.png", "cut.jpg"}
    synthesise([portraits], tmp_path / "one", Copier, origin)
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two and len(one) == 12
    items = [item for shard in shards_of(tmp_path / "one", PICTURES) for item in shard.items()]
    (a,) = {item.reference.read_bytes() for item in items if item.said("licence") == "MIT"}
    assert a == (portraits / "person_a_1.jpg").read_bytes()
    mine = [item for item in items if item.said("licence") == "MIT"]
    assert {item.said("source") for item in mine} == {"a copier, from a.example"}
    assert len({item.said("caption") for item in mine}) == 2
    assert all(item.said("caption").startswith("A woman img ") for item in mine)
    for wrong, told in ((dataclasses.replace(origin, each=0), "0 pictures"), (origin, "lies in the input")):
        with pytest.raises(SettingError, match=told):
            synthesise([portraits], portraits / "out", Copier, wrong)


def test_killed_and_run_again(
    tmp_path: Path, portraits: Path, weights: tuple[Path, Path], insightface_root: Path, repository: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "pairs"
    models = [f"--insightface-root={insightface_root}", "--face-pack=buffalo_sc", f"--sdxl={weights[0]}"]
    command = ["synthesise", str(portraits), f"--out={out}", "--steps=2", *models]
    whole = [*command, f"--photomaker={weights[1]}"]
    killed = subprocess.Popen(
        [sys.executable, "-m", "mm_core.curation", *whole, "--each=999"], cwd=repository, stderr=subprocess.DEVNULL
    )
    while not list(out.glob("*-0.jpg")):
        assert killed.poll() is None, "it ended before it was killed"
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    first = {path: path.stat().st_mtime_ns for path in out.glob("*-0.jpg")}
    assert main([*whole, "--each=1"]) == 0
    said = capsys.readouterr()
    assert "2 pairs, 2 portraits left out" in said.out and "left out: wall.png: " in said.err
    assert all(path.stat().st_mtime_ns == at for path, at in first.items())
    assert {np.asarray(Image.open(path)).shape for path in out.glob("*-0.jpg")} == {(32, 32, 3)}

    (tmp_path / "prompts.txt").write_text("A {person} reads.\nA wall.\n")
    for change, told in (
        ([*whole, "--seed=1"], "made with seed 0, not 1"),
        ([*whole, f"--prompts={tmp_path / 'prompts.txt'}"], "line 2: 'A wall.' must have {person} once"),
        ([*command, f"--photomaker={tmp_path / 'none.bin'}", "--out=x"], "It is photomaker-v2.bin of https://"),
        ([*whole, f"--sdxl={tmp_path}", "--out=x"], "such as stabilityai/stable-diffusion-xl-base-1.0"),
    ):
        assert main([part.replace("--out=x", f"--out={tmp_path / 'x'}") for part in change]) == 2
        assert told in capsys.readouterr().err


@pytest.mark.parametrize("offload", ["model", "sequential"])
def test_an_accelerator_makes_the_same(
    maker: PhotoMaker, weights: tuple[Path, Path], accelerator: Accelerator, offload: str
) -> None:
    marked, id_tokens = mark_identity("A man img reads."), torch.ones(2, 64)
    settings = dict(precision="fp32", offload=offload, steps=STEPS)
    found = load_photomaker(*weights, None, accelerator.device, **settings).denoised(marked, id_tokens, seed=5)
    assert np.array_equal(found, maker.denoised(marked, id_tokens, seed=5))
