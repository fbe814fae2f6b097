"""A system's clips of a benchmark under the names that other benchmarks look for."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ..choices import EXPORTS
from ..errors import MagicMirrorError, SettingError
from ..files import atomic_folder, write_json
from ..limits import NAME_PART_BYTES
from ..pipelines.prompt import without_trigger
from .benchmark_set import Entry
from .generate import clip_of


def export_vbench(entries: Sequence[Entry], clips: Path, out: Path) -> None:
    """`<prompt>-<index>.mp4`, for VBench's `--mode custom_input`; clips of one prompt are counted from 0.

    Raises SettingError for a prompt that is no file name, MagicMirrorError for a clip that is missing.
    """
    seen: Counter[str] = Counter()
    with atomic_folder(out) as temporary:
        for entry in entries:
            prompt = without_trigger(entry.prompt)
            name = f"{prompt}-{seen[prompt]}.mp4"
            if "/" in name or "\n" in name or len(name.encode()) > NAME_PART_BYTES:
                raise SettingError(f"The prompt of {entry.name} is no file name, as VBench wants it to be: shorten it")
            shutil.copyfile(_there(clips, entry), temporary / name)
            seen[prompt] += 1


def export_opens2v(entries: Sequence[Entry], clips: Path, out: Path) -> None:
    """`Videos/singleface_<n>.mp4`, the given pictures, and `Human-Domain_Eval.json`, for OpenS2V-Eval.

    Raises SettingError for people of no known class, MagicMirrorError for a clip that is missing.
    """
    index = {}
    with atomic_folder(out) as temporary:
        (temporary / "Videos").mkdir()
        for number, entry in enumerate(entries, 1):
            if not entry.kind:
                raise SettingError(f"{entry.person} has no class, which OpenS2V-Eval wants: make the set with `set`")
            # Its code finds the person's picture by these folders, of which there are two.
            folder = "woman" if entry.kind in ("woman", "elderly woman", "girl") else "man"
            picture = f"Images/singleface/{folder}/{entry.person}{entry.photos[0].suffix}"
            (temporary / picture).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(entry.photos[0], temporary / picture)
            shutil.copyfile(_there(clips, entry), temporary / "Videos" / f"singleface_{number}.mp4")
            index[f"singleface_{number}"] = {
                "img_paths": [picture], "prompt": without_trigger(entry.prompt), "class_label": [folder.capitalize()],
            }  # fmt: skip
        write_json(temporary / "Human-Domain_Eval.json", index)


WRITERS = dict(zip(EXPORTS, (export_vbench, export_opens2v), strict=True))


def _there(clips: Path, entry: Entry) -> Path:
    path = clip_of(clips, entry)
    if not path.is_file():
        raise MagicMirrorError(f"{path} is missing: finish the benchmark first")
    return path
