"""The finished small model as it ships: one folder, half precision, no paths of the machine that it was made on."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from mm_core.checkpoints.adapter_file import load_adapter, save_adapter
from mm_core.checkpoints.photomaker import load_id_encoder, read_id_encoder_config, save_id_encoder
from mm_core.choices import TINY
from mm_core.files import atomic_folder, write_json
from mm_core.pipelines.base import FolderBase, TinyBase
from mm_core.pipelines.preview import LATENT_RGB, fit_latent_rgb, save_latent_rgb

_MACHINE = ("_name_or_path", "name_or_path")


def pack(base: Path, id_encoder: Path, adapter: Path, folder: Path) -> TinyBase:
    """Write the folder that `TinyBase` reads.

    base: a folder in diffusers' layout. id_encoder, adapter: files trained with it. Raises CheckpointError for damage.
    """
    weights, header = load_adapter(adapter, dtype=torch.float16)
    with atomic_folder(folder) as temporary:
        packed = TinyBase(temporary)
        pipe = FolderBase(base).load(torch.float16)
        pipe.save_pretrained(temporary)
        save_latent_rgb(fit_latent_rgb(pipe.vae, torch.device("cpu")), temporary / LATENT_RGB)
        save_id_encoder(load_id_encoder(id_encoder), packed.id_encoder, read_id_encoder_config(id_encoder))
        save_adapter(weights, packed.adapter, base_model=TINY, trained=header.trained)
        for path in [temporary / "model_index.json", *temporary.rglob("*config.json")]:
            content = json.loads(path.read_text(encoding="utf-8"))
            write_json(path, {name: value for name, value in content.items() if name not in _MACHINE})
    return TinyBase(folder)
