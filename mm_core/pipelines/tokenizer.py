"""T5's tokenizer from its own file alone: the settings beside it, which may name a class, are never read."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, T5TokenizerFast

from ..errors import CheckpointError
from ..json_file import read_object
from ..limits import TOKENIZER_BYTES

FILES = ("tokenizer.json", "spiece.model")
"""Either of them; the first is read where both are there."""
_SPECIAL = dict(pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
# Of the many steps that the file format knows, those of T5. The others include regular expressions of the file's own.
_STEPS = {
    "normalizer": {"Sequence", "Precompiled", "Replace", "Strip", "NFC", "NFKC", "NFD", "NFKD", "Nmt", "Prepend"},
    "pre_tokenizer": {"Sequence", "Metaspace", "WhitespaceSplit"},
    "post_processor": {"TemplateProcessing"},
    "decoder": {"Metaspace", "Sequence"},
}
_PATTERNS = ({"Regex": " {2,}"}, {"String": " "})


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder. Raises CheckpointError for a file that is missing, damaged or not T5's."""
    path = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if path is None:
        raise CheckpointError(f"{folder} holds no {' or '.join(FILES)}. Download the model again.")
    return _from_json(path) if path.name == FILES[0] else _from_sentencepiece(path)


def _from_json(path: Path) -> PreTrainedTokenizerFast:
    content = read_object(path, most=TOKENIZER_BYTES)
    _check(content, path)
    try:
        tokenizer = Tokenizer.from_str(json.dumps(content))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # also a panic of the Rust code, which is no Exception
        raise CheckpointError(f"{path} is damaged: {error}. Download it again.") from error
    missing = [token for token in _SPECIAL.values() if tokenizer.token_to_id(token) is None]
    if missing:
        raise CheckpointError(f"{path} is not T5's: it lacks the tokens {', '.join(missing)}. Download it again.")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **_SPECIAL)


def _check(content: Mapping[str, Any], path: Path) -> None:
    model = content.get("model")
    kind = model.get("type") if isinstance(model, dict) else None
    if kind != "Unigram":
        raise CheckpointError(f"{path} holds a {kind} model, not T5's Unigram. Use the tokenizer of the base model.")
    for part, allowed in _STEPS.items():
        for step in _steps(content.get(part)):
            if step.get("type") not in allowed:
                raise CheckpointError(f"{path}: its {part} has a step {step.get('type')!r}, which T5's has not.")
            if step["type"] == "Replace" and step.get("pattern") not in _PATTERNS:
                raise CheckpointError(f"{path}: its {part} replaces {step.get('pattern')}, which T5's does not.")


def _steps(step: Any) -> Iterator[Mapping[str, Any]]:
    """A step, and those that it is a sequence of, to any depth."""
    waiting = [step]
    while waiting:
        step = waiting.pop()
        if isinstance(step, dict):
            yield step
            for value in step.values():
                if isinstance(value, list) and step.get("type") == "Sequence":
                    waiting += value


def _from_sentencepiece(path: Path) -> PreTrainedTokenizerBase:
    # What the file is read with. Where one is missing, transformers asks for tiktoken, which would not help.
    import google.protobuf  # noqa: F401
    import sentencepiece  # noqa: F401

    if path.stat().st_size > TOKENIZER_BYTES:
        raise CheckpointError(f"{path} has {path.stat().st_size:,} bytes; T5's has 800,000. Download it again.")
    try:
        # Alone in a folder: transformers reads whatever settings lie beside it, and they may name a class.
        with tempfile.TemporaryDirectory() as alone:
            shutil.copyfile(path, Path(alone) / path.name)
            return T5TokenizerFast.from_pretrained(alone, local_files_only=True)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # also a panic of the Rust code, which is no Exception
        raise CheckpointError(f"{path} is damaged: {error}. Download it again.") from error
