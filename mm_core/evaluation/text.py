"""Whether a clip shows what its prompt says: CLIP's cosine of frames and prompt, where the user has a CLIP."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ..errors import CheckpointError, MagicMirrorError, reason
from ..faces.crop import whole_image
from ..pipelines.prompt import without_trigger
from .metrics import sample_evenly

SAMPLES = 8  # frames of a clip, evenly spaced
PROMPTS_FILE = "prompts.json"


class TextAlignment:
    """A transformers CLIPModel from a folder, on the CPU; nothing is downloaded.

    Raises CheckpointError if the folder does not hold one with its tokenizer.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import CLIPModel, CLIPTokenizer

        try:
            if not (folder / "config.json").is_file():  # transformers would take the name for one on the hub
                raise OSError("it has no config.json")
            # Named here: a folder may name an attention that transformers fetches as code.
            own = dict(local_files_only=True, use_safetensors=True, attn_implementation="sdpa")
            self._model = CLIPModel.from_pretrained(folder, **own)
            self._tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{folder} holds no CLIP model: {reason(error)}. Give a folder with config.json, model.safetensors and "
                "the tokenizer's files, such as a copy of openai/clip-vit-base-patch32"
            ) from error

    def __call__(self, frames: Iterable[np.ndarray], prompt: str) -> float:
        """Mean over frames, (H, W, 3) uint8 RGB, of the cosine to the prompt, -1 to 1.

        A prompt that is longer than CLIP's text, 77 tokens, is cut off. NaN without frames.
        """
        import torch
        from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

        size = self._model.config.vision_config.image_size
        crops = [whole_image(frame, size) for frame in frames]
        if not crops:
            return float("nan")
        pixels = (np.stack(crops) / 255 - OPENAI_CLIP_MEAN) / OPENAI_CLIP_STD  # (N, size, size, 3)
        length = self._model.config.text_config.max_position_embeddings
        tokens = self._tokenizer([prompt], truncation=True, max_length=length, return_tensors="pt")
        with torch.inference_mode():
            found = self._model(
                input_ids=tokens["input_ids"],
                attention_mask=tokens["attention_mask"],
                pixel_values=torch.from_numpy(pixels).permute(0, 3, 1, 2).float(),
            )
        return float((found.image_embeds @ found.text_embeds.T).mean())  # both have length 1


def sampled(frames: Iterable[np.ndarray], count: int) -> list[np.ndarray]:
    """At most SAMPLES of a clip's `count` frames, evenly spaced."""
    wanted = set(sample_evenly(count, SAMPLES).tolist())
    return [frame for index, frame in enumerate(frames) if index in wanted]


def find_prompts(folder: Path, videos: list[Path], references: Path | None = None) -> dict[Path, str]:
    """The prompts of those videos that have one: `<video>.txt` beside it, or its name in the folder's prompts.json.

    The file maps paths below the folder, with or without ending, to prompts. references: there, the prompt of
    anna_prompt2.mp4 may be anna/prompt2.txt, as in the IPVG challenge.
    Raises MagicMirrorError for a prompts.json that does not.
    """
    listed = _read_prompts(folder / PROMPTS_FILE)
    prompts = {}
    for video in videos:
        beside, name = video.with_suffix(".txt"), video.relative_to(folder)
        person, _, prompt = video.stem.rpartition("_")
        of_person = references / person / f"{prompt}.txt" if references and person else beside
        if file := next((file for file in (beside, of_person) if file.is_file()), None):
            prompts[video] = file.read_text(encoding="utf-8").strip()
        else:
            prompts[video] = listed.get(name.as_posix()) or listed.get(name.with_suffix("").as_posix()) or ""
    return {video: without_trigger(prompt) for video, prompt in prompts.items() if prompt}


def _read_prompts(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    try:
        prompts = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise MagicMirrorError(f"{path} is no JSON: {error}. Write it again as {{video: prompt}}") from error
    if not isinstance(prompts, dict) or not all(isinstance(prompt, str) for prompt in prompts.values()):
        raise MagicMirrorError(f"{path} must hold one object of prompts by video, {{video: prompt}}: write it again")
    return prompts
