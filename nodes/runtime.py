"""ComfyUI itself: model folders, output files, devices, memory, progress, interruption. Nothing else imports it."""

from __future__ import annotations

import functools
import gc
import importlib.util
import inspect
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import comfy.model_management
import comfy.utils
import folder_paths
import torch
from comfy.cli_args import args
from comfy_api.latest import io, ui

from ..mm_core.errors import CheckpointError, MagicMirrorError, SettingError, packages, printable
from ..mm_core.filenames import expand, locate
from ..mm_core.files import Numbered
from ..mm_core.folders import check_name
from ..mm_core.names import is_below
from .inputs import check_inputs

if TYPE_CHECKING:
    from PIL import Image

    from ..mm_core.pipelines.clip import StepCallback

log = logging.getLogger(__name__)
MagicMirrorError.__module__ = "MagicMirror"  # as its subclasses have it; Ray's workers need the real one

# Kinds of models this pack adds; each is a folder of that name below ComfyUI's `models`, and may be set to others in
# extra_model_paths.yaml.
BASE_MODELS = "CogVideo"
ADAPTERS = "magic_mirror"
FACE_MODELS = "insightface"
IDENTITIES = "magic_mirror_identities"

Cancelled = comfy.model_management.InterruptProcessingException
"""What core raises in a node that the user cancels."""

_PREVIEW_SIZE = 512
_KEY_LENGTH = 79  # of a text in a PNG
_LOCALES = Path(__file__).resolve().parent.parent / "locales"


def in_users_language(node: type[io.ComfyNode]) -> type[io.ComfyNode]:
    """Let the page show what a node raises in the language that the page is in; the log keeps the English text."""
    execute = node.execute.__func__

    @functools.wraps(execute)
    def speaking(cls: type[io.ComfyNode], *arguments: object, **inputs: object) -> io.NodeOutput:
        try:
            with packages():
                check_inputs(cls, inputs)
                return execute(cls, *arguments, **inputs)
        except MagicMirrorError as error:
            english, text = str(error), translated(error)
            if text != english:
                log.error("MagicMirror: %s", english)
                error.args = (text,)
            raise

    node.execute = classmethod(speaking)
    return node


def translated(error: MagicMirrorError) -> str:
    """The message of an error in the page's language; in English where it has no translation."""
    language = _language()
    if error.key is None or language not in {folder.name for folder in _LOCALES.iterdir()}:
        return str(error)
    texts = json.loads((_LOCALES / language / "main.json").read_text(encoding="utf-8"))
    return printable(texts["magicMirror"]["errors"][error.key].format(**error.values))


def _language() -> str:
    """The language that was set for ComfyUI's page.

    English when none was, since a node does not know the browser's; and when ComfyUI has several users, since a node
    does not know for whom it runs.
    """
    settings = Path(folder_paths.get_user_directory()) / "default" / "comfy.settings.json"
    if args.multi_user or not settings.is_file():
        return "en"
    try:
        return json.loads(settings.read_text(encoding="utf-8")).get("Comfy.Locale", "en")
    except ValueError:  # ComfyUI says so in its log, and goes on without settings
        return "en"


def has_cogvideox() -> bool:
    """Whether this ComfyUI has CogVideoX as a model of its own."""
    return importlib.util.find_spec("comfy.ldm.cogvideo") is not None


def register_model_folders() -> None:
    """Make this pack's kinds of models known to ComfyUI."""
    for kind in (BASE_MODELS, ADAPTERS, FACE_MODELS, IDENTITIES):
        folder_paths.add_model_folder_path(kind, str(Path(folder_paths.models_dir) / kind))


def model_folders(kind: str) -> list[Path]:
    """The folders of a kind of models, the one for downloads first."""
    return [Path(folder) for folder in folder_paths.get_folder_paths(kind)]


def model_files(kind: str, *suffixes: str) -> list[str]:
    """Names of the files of a kind, as a combo box offers them."""
    return [name for name in folder_paths.get_filename_list(kind) if name.lower().endswith(suffixes)]


def model_file(kind: str, name: str) -> Path:
    """The path of one of `model_files`, or of another file below the folders of the kind.

    Raises:
        CheckpointError: it is not there, or it leads out of the folders; a link in the list is its owner's choice.
    """
    check_name(name)
    path = folder_paths.get_full_path(kind, name)
    folders = model_folders(kind)
    if path is None:
        raise CheckpointError(
            "There is no {name} in {folders}. Put it there, or choose another file.",
            key="file_missing",
            name=name,
            folders=" or ".join(map(str, folders)),
        )
    if name not in folder_paths.get_filename_list(kind) and not any(is_below(Path(path), root) for root in folders):
        raise CheckpointError(
            f"{name} leads out of {' and '.join(map(str, folders))}. Choose a file of the list, or put it there."
        )
    return Path(path)


def cache_folder() -> Path:
    """A folder that stays, and that ComfyUI serves to nobody."""
    return Path(folder_paths.get_system_user_directory("magic_mirror"))


def t5_tokenizer() -> Path:
    """The folder of the T5 tokenizer that is part of ComfyUI."""
    return Path(inspect.getfile(comfy.utils)).parent / "text_encoders" / "t5_tokenizer"


def device() -> torch.device:
    """Where ComfyUI computes."""
    return comfy.model_management.get_torch_device()


def release_memory() -> None:
    """Give back what finished work left behind."""
    gc.collect()
    comfy.model_management.soft_empty_cache()


def step_callback(steps: int) -> StepCallback:
    """Progress bar, preview picture and cancelling, once a step."""
    bar = comfy.utils.ProgressBar(steps)

    def on_step(done: int, total: int, preview: Callable[[], Image.Image]) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, total, ("JPEG", preview(), _PREVIEW_SIZE))

    return on_step


def progress_callback(total: int) -> Callable[[int], None]:
    """Progress bar and cancelling; told how many of `total` frames, or bytes, are done."""
    bar = comfy.utils.ProgressBar(total)

    def on_progress(done: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, total)

    return on_progress


def frames_callback() -> Callable[[int, int], None]:
    """Progress bar and cancelling; told how many frames are done, of how many, and as often as it can be cancelled."""
    bar, shown = comfy.utils.ProgressBar(1), -1

    def on_frame(done: int, total: int) -> None:
        nonlocal shown
        comfy.model_management.throw_exception_if_processing_interrupted()
        if done != shown:
            shown = done
            bar.update_absolute(done, total)

    return on_frame


def show(text: str, *, warn: bool = False) -> ui.PreviewText:
    """Write a text into the log. The result, a node's ui, puts it into the history and on the node (web/said.js)."""
    text = printable(text)
    log.log(logging.WARNING if warn else logging.INFO, "MagicMirror: %s", text)
    return ui.PreviewText(text)


def output_file(
    prefix: str,
    suffix: str,
    hidden: io.HiddenHolder | None = None,
    *,
    width: int = 0,
    height: int = 0,
    temporary: bool = False,
) -> Numbered:
    """The next file of a name in ComfyUI's output folder; in the one that it clears when it starts, if `temporary`.

    hidden: the graph, for a prefix with names of its widgets. Raises SettingError: see `locate`.
    """
    root = folder_paths.get_temp_directory() if temporary else folder_paths.get_output_directory()
    folder, name = locate(_expand(prefix, hidden, width, height), Path(root), suffix)
    return Numbered(folder, name, suffix)


def saved_result(file: Numbered, *, temporary: bool = False) -> ui.SavedResult:
    """How ComfyUI's page refers to a finished `output_file`."""
    root = folder_paths.get_temp_directory() if temporary else folder_paths.get_output_directory()
    subfolder = os.path.relpath(file.folder, root)
    kind = io.FolderType.temp if temporary else io.FolderType.output
    return ui.SavedResult(file.path.name, "" if subfolder == os.curdir else subfolder, kind)


def new_model_file(kind: str, prefix: str, suffix: str, hidden: io.HiddenHolder | None = None) -> Numbered:
    """The next file of a name in the first folder of a kind of models. Raises SettingError: see `locate`."""
    folder, name = locate(_expand(prefix, hidden), model_folders(kind)[0], suffix)
    return Numbered(folder, name, suffix)


def _expand(prefix: str, hidden: io.HiddenHolder | None, width: int = 0, height: int = 0) -> str:
    if hidden is None:
        return expand(prefix, width=width, height=height)
    workflow = _beside(hidden).get("workflow")
    return expand(prefix, prompt=hidden.prompt or {}, workflow=workflow, width=width, height=height)


def prefix_problem(prefix: str | None, suffix: str, kind: str | None = None) -> str | None:
    """What is wrong with a prefix, as `validate_inputs` tells it; None if nothing is, or it comes from another node.

    kind: of models; None for the output folder.
    """
    if not isinstance(prefix, str):  # connected, missing, or no text: ComfyUI tells
        return None
    try:
        output_file(prefix, suffix) if kind is None else new_model_file(kind, prefix, suffix)
    except SettingError as error:
        return translated(error)
    return None


def workflow_metadata(hidden: io.HiddenHolder) -> dict[str, str]:
    """The graph that is being executed, to be written into a file; empty where the user runs ComfyUI without."""
    if args.disable_metadata:
        return {}
    graph = {"prompt": hidden.prompt} | _beside(hidden)
    return {ascii(key)[1:-1][:_KEY_LENGTH]: json.dumps(value) for key, value in graph.items() if value is not None}


def _beside(hidden: io.HiddenHolder) -> dict[str, object]:
    """What the page sends beside the graph, the workflow among it; an API client may send anything."""
    return hidden.extra_pnginfo if isinstance(hidden.extra_pnginfo, dict) else {}
