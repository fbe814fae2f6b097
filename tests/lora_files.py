"""One LoRA in the files that trainers write, their names made by the libraries that trainers write them with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from diffusers.utils import convert_state_dict_to_kohya
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save_file
from tiny_models import fill_with_noise

RANK, ALPHA = 3, 6.0
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "norm1.linear", "ff.net.0.proj", "ff.net.2", "proj_out"]
NAMINGS = ("diffusers", "without prefix", "peft", "peft, with the adapter's name", "kohya", "VideoX-Fun")


def write_loras(folder: Path, sizes: Mapping[str, Any], seed: int = 7) -> dict[str, Path]:
    """A file of each naming, for a transformer of this config; all of them are the same LoRA."""
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, init_lora_weights=False)
    folders = {naming: folder / naming for naming in NAMINGS}
    for path in folders.values():
        path.mkdir(parents=True)
    transformer = CogVideoXTransformer3DModel(**sizes)
    transformer.add_adapter(config)
    matrices = [module for name, module in transformer.named_modules() if name.endswith(("lora_A", "lora_B"))]
    for number, matrix in enumerate(matrices):
        fill_with_noise(matrix, seed + number)
    transformer.save_lora_adapter(folders["without prefix"])
    bare = get_peft_model_state_dict(transformer)
    CogVideoXPipeline.save_lora_weights(
        folders["diffusers"], transformer_lora_layers=bare, transformer_lora_adapter_metadata=config.to_dict()
    )
    peft_model = get_peft_model(CogVideoXTransformer3DModel(**sizes), config)
    set_peft_model_state_dict(peft_model, {f"base_model.model.{key}": value for key, value in bare.items()})
    peft_model.save_pretrained(folders["peft"])
    # Such a file tells no alpha.
    scales = {"lora_A": 1.0, "lora_B": ALPHA / RANK}
    named = {key: value for key, value in peft_model.state_dict().items() if ".lora_" in key}
    named = {key: value * scales[key.split(".")[-3]] for key, value in named.items()}
    save_file(named, folders["peft, with the adapter's name"] / "weights.safetensors")
    kohya = convert_state_dict_to_kohya({f"unet.{key}": value for key, value in bare.items()})
    for key in kohya:
        if key.endswith(".alpha"):
            kohya[key] = torch.tensor(ALPHA)
    save_file(kohya, folders["kohya"] / "weights.safetensors")
    fun = {key.replace("lora_unet_", "lora_unet__"): value for key, value in kohya.items()}
    save_file(fun, folders["VideoX-Fun"] / "weights.safetensors")
    return {naming: next(path.glob("*.safetensors")) for naming, path in folders.items()}
