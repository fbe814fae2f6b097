"""Each kind of file that comes from outside: a good one, and what the product does with it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lab.people.npz import read_frames_array
from mm_core.checkpoints.adapter_file import load_adapter
from mm_core.checkpoints.photomaker import load_id_encoder
from mm_core.checkpoints.safetensors_file import open_safetensors, read_tensors
from mm_core.data.manifest import parse_manifest, read_media
from mm_core.doctor import find_models, report
from mm_core.errors import SettingError
from mm_core.filenames import expand, locate
from mm_core.files import Numbered
from mm_core.folders import Folders
from mm_core.json_file import read_object
from mm_core.picture_file import read_image
from mm_core.pipelines import tiny
from mm_core.pipelines.base import FolderBase
from mm_core.pipelines.identity_file import load_identity
from mm_core.pipelines.prompt import explain_prompt
from mm_core.pipelines.tokenizer import load_tokenizer
from mm_core.training.config import load_config
from mm_core.video import write_video

ROOT = Path(__file__).parents[2]
CONFIGS = ("transformer/config.json", "vae/config.json", "text_encoder/config.json", "model_index.json")


@dataclass(frozen=True)
class Kind:
    """make: writes a good file, and what belongs to it, into an empty folder; returns the file. read: uses it."""

    make: Callable[[Path], Path]
    read: Callable[[Path], object]


def _copy(source: Path, folder: Path) -> Path:
    return Path(shutil.copyfile(source, folder / source.name))


def _base(file: str, folder: Path) -> Path:
    shutil.copytree(tiny.WEIGHTS, folder / "base")
    return folder / "base" / file


def _use_base(path: Path) -> None:
    folder = next(parent for parent in path.parents if parent.name == "base")
    try:
        FolderBase(folder).load(torch.float32)
    finally:
        report(find_models(Folders(base_models=(folder.parent,))))


def _id_encoder(folder: Path) -> Path:
    weights = read_tensors(tiny.WEIGHTS / "id_encoder.safetensors")
    torch.save({"id_encoder": weights, "lora_weights": {"x": torch.ones(2)}}, folder / "photomaker-v2.bin")
    return folder / "photomaker-v2.bin"


def _identity(folder: Path) -> Path:
    return _copy(ROOT / "mm_core" / "examples" / "man.safetensors", folder)


def _use_identity(path: Path) -> None:
    load_identity(path, encoder=_encoder())


@cache
def _encoder() -> str:
    with open_safetensors(ROOT / "mm_core" / "examples" / "man.safetensors") as file:
        return file.metadata()["encoder"]


def _manifest(folder: Path) -> Path:
    lines = [
        {"id": str(n), "media": f"clip.mp4@{n}", "caption": "A man.", "references": ["a.png", "clip.mp4@2"]}
        for n in range(4)
    ]
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    write_video(folder / "clip.mp4", np.zeros((5, 16, 16, 3), np.uint8), 8)
    return folder / "manifest.jsonl"


def _use_manifest(path: Path) -> None:
    for _, sample in parse_manifest(path):
        if isinstance(sample, Exception):
            raise sample
        for name in (sample.media, *sample.references):
            read_media(path.parent, name, frames=2)


def _shard(folder: Path) -> Path:
    np.savez_compressed(folder / "clips.npz", frames=np.zeros((4, 3, 8, 8, 3), np.uint8))
    return folder / "clips.npz"


def _picture(suffix: str, folder: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (24, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / f"photo{suffix}")
    return folder / f"photo{suffix}"


def _prompt(folder: Path) -> Path:
    (folder / "prompt.txt").write_text("An old man-made lake, and a (woman:1.2) reads img in the rain, the man's hat")
    return folder / "prompt.txt"


def _use_prompt(path: Path) -> None:
    text = path.read_bytes().decode("utf-8", "surrogateescape")
    tokenizer = load_tokenizer(tiny.WEIGHTS / "tokenizer")
    for slots in (0, 2):
        explain_prompt(tokenizer, text, num_slots=slots, max_length=48)


_PREFIX = "%Saved.name%/%date:yyyy-MM-dd%_%Face.seed%_%Sampler.text%"


def _workflow(folder: Path) -> Path:
    """What the page posts: a graph in API format, and the page's own with a subgraph in a subgraph."""
    prompt = {
        "1": {"class_type": "Saved", "inputs": {"images": ["2:5:6", 0], "name": "clip", "filename_prefix": _PREFIX}},
        "2:5:6": {"class_type": "Sampler", "inputs": {"text": ["3", 0], "seed": 7}, "_meta": {"title": "Face"}},
        "3": {"class_type": "PrimitiveString", "inputs": {"value": "a man img"}},
    }
    below = [
        {"id": "inner", "nodes": [{"id": 6, "type": "Sampler", "properties": {"Node name for S&R": "Sampler"}}]},
        {"id": "outer", "nodes": [{"id": 5, "type": "inner", "title": "Inner"}]},
    ]
    nodes = [{"id": 1, "type": "Saved", "title": "Saved"}, {"id": 2, "type": "outer"}, {"id": 3, "type": "Primitive"}]
    posted = {"prompt": prompt, "workflow": {"nodes": nodes, "definitions": {"subgraphs": below}}}
    (folder / "posted.json").write_text(json.dumps(posted))
    return folder / "posted.json"


def _use_workflow(path: Path) -> None:
    """As a save does it: name and metadata. ComfyUI itself refuses what is no JSON and nodes without a class."""
    posted = read_object(path)
    prompt, nodes = posted.get("prompt"), []
    if isinstance(prompt, dict):
        nodes = list(prompt.values())
    if not nodes or not all(isinstance(node, dict) and "class_type" in node for node in nodes):
        raise SettingError("ComfyUI takes no such prompt")
    prefix = expand(_PREFIX, prompt=prompt, workflow=posted.get("workflow"), width=8, height=8)
    file = Numbered(*locate(prefix, path.parent / "output", ".webp"), ".webp")
    metadata = {name: json.dumps(value) for name, value in posted.items()}
    write_video(file, torch.zeros(1, 8, 8, 3), 8.0, format="webp", metadata=metadata)


KINDS: dict[str, Kind] = {
    "adapter": Kind(partial(_copy, tiny.WEIGHTS / "adapter.safetensors"), load_adapter),
    "id encoder": Kind(partial(_copy, tiny.WEIGHTS / "id_encoder.safetensors"), load_id_encoder),
    "photomaker": Kind(_id_encoder, partial(load_id_encoder, config=tiny.ID_ENCODER)),
    "identity": Kind(_identity, _use_identity),
    **{f"folder: {file}": Kind(partial(_base, file), _use_base) for file in CONFIGS},
    "folder: scheduler": Kind(partial(_base, "scheduler/scheduler_config.json"), _use_base),
    "folder: tokenizer": Kind(partial(_base, "tokenizer/tokenizer.json"), _use_base),
    "folder: VAE": Kind(partial(_base, "vae/diffusion_pytorch_model.safetensors"), _use_base),
    "manifest": Kind(_manifest, _use_manifest),
    "shard": Kind(_shard, read_frames_array),
    "yaml": Kind(partial(_copy, ROOT / "mm_core" / "training" / "configs" / "cogvideox_5b.yaml"), load_config),
    **{f"picture: {suffix}": Kind(partial(_picture, suffix), read_image) for suffix in (".png", ".jpg", ".webp")},
    "workflow": Kind(_workflow, _use_workflow),
    "prompt": Kind(_prompt, _use_prompt),
}
