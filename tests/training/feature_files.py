"""Precomputed features of invented people, at the sizes of `tiny_models`: what `precompute` would write, without it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny_models import ADAPTER_SIZES, FRAMES, HEIGHT, PROMPT_TOKENS, WIDTH, noise

from mm_core.data.features import FORMAT, INDEX, ROWS, shard_name

TEXT_DIM, IMAGE_TOKENS, PIXEL_FRAMES = 14, 5, 4 * (FRAMES - 1) + 1


def write_features(folder: Path, *, samples: int = 12, people: int = 4, pictures: bool = False) -> Path:
    """A folder that `Features.open` reads: sample i is of person i % people, who has two reference photos."""
    folder.mkdir(parents=True)
    frames, pixel_frames = (1, 1) if pictures else (FRAMES, PIXEL_FRAMES)
    references = 2 * people
    empty, prompts = (noise(n, PROMPT_TOKENS, TEXT_DIM, seed=seed).half() for n, seed in ((1, 6), (samples, 5)))
    tables = {
        "prompts": {
            "prompt_embeds": torch.cat([empty, prompts]),
            "slots": torch.tensor([[0, 0], *([1 + i % 3, 2 + i % 3] for i in range(samples))]),
        },
        "references": {
            "id_tokens": noise(references, 2, ADAPTER_SIZES["id_token_dim"], seed=1).half(),
            "structure_tokens": noise(references, IMAGE_TOKENS, ADAPTER_SIZES["clip_hidden_size"], seed=2).half(),
            "embedding": noise(references, 512, seed=3) * 25,
        },
        "samples": {
            "latents": noise(samples, frames, 4, HEIGHT, WIDTH, seed=4).half(),
            "seen": torch.ones(samples, frames, dtype=torch.bool),
            "boxes": torch.tensor([[8.0, 8.0, 24.0, 24.0]]).expand(samples, pixel_frames, 4).contiguous(),
            "landmarks": (torch.tensor([[12, 12], [20, 12], [16, 16], [13, 20], [19, 20]]).float())
            .expand(samples, pixel_frames, 5, 2)
            .contiguous(),
        },
    }
    shards = []
    for kind, tensors in tables.items():
        path = folder / shard_name(kind, 0)
        save_file(tensors, path, {ROWS: json.dumps({"rows": [], "skipped": {}})})
        shards.append({"file": path.name, "bytes": path.stat().st_size})
    index = {
        "settings": {"format": FORMAT},
        "counts": {"samples": samples, "references": references, "skipped": {}},
        "shards": shards,
        "prompts": [{"shard": 0, "row": i} for i in range(samples + 1)],
        "references": [{"path": f"{i}.jpg", "shard": 0, "row": i} for i in range(references)],
        "samples": [
            {"id": str(i), "person": f"p{i % people}", "references": [2 * (i % people), 2 * (i % people) + 1],
             "prompt": i + 1, "shard": 0, "row": i}
            for i in range(samples)
        ],
    }  # fmt: skip
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")
    return folder
