"""One clip on two processes is the clip of one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from processes import PREPARATION, run_two
from safetensors.torch import load_file
from tiny_models import TINY_KINDS, assert_near, build_identity

from mm_core.errors import SettingError
from mm_core.pipelines.base import FolderBase
from mm_core.pipelines.clip import ClipSettings
from mm_core.pipelines.magic_mirror import MagicMirror

CLIP = ClipSettings(
    prompt="A woman img smiles.", width=48, height=32, num_frames=17, steps=2, guidance_scale=3.0, scheduler="ddim"
)
WORKER = """
import torch
from safetensors.torch import save_file
from tiny_models import build_identity
from mm_core.errors import SettingError
from mm_core.pipelines.base import FolderBase
from mm_core.pipelines.clip import *
from mm_core.pipelines.magic_mirror import MagicMirror
state, found = PartialState(), {{}}
for kind, folder in {folders!r}.items():
    base, seen = FolderBase(Path(folder)), []
    mirror = MagicMirror(
        base, adapter=base.folder / "adapter.safetensors", precision="fp32", context_parallel=True, device=state.device
    )
    mirror.pipeline.transformer.transformer_blocks[2].ff.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].shape[1])
    )
    found[kind] = mirror.sample({clip!r}, build_identity())
    found[kind + " plain"] = mirror.sample({clip!r})
    found[kind + " tokens"] = torch.tensor(seen)
save_file({{name: tensor.contiguous() for name, tensor in found.items()}}, f"{out}.{{state.process_index}}")
state.destroy_process_group()
"""


def test_two_processes_make_the_clip_of_one(folders: dict[str, Path], tmp_path: Path) -> None:
    """With an identity and without, of each kind of model, with an odd number of text and of face tokens. Each process
    computes a half of the tokens."""
    code = WORKER.format(folders={kind: str(path) for kind, path in folders.items()}, clip=CLIP, out=tmp_path / "out")
    (tmp_path / "worker.py").write_text(PREPARATION + code, encoding="utf-8")
    run_two(str(tmp_path / "worker.py"))
    first, second = (load_file(f"{tmp_path / 'out'}.{rank}") for rank in range(2))
    for kind in TINY_KINDS:
        folder = folders[kind]
        mirror = MagicMirror(
            FolderBase(folder), adapter=folder / "adapter.safetensors", precision="fp32", device=torch.device("cpu")
        )
        whole: list[int] = []
        mirror.pipeline.transformer.transformer_blocks[2].ff.register_forward_pre_hook(
            lambda _, inputs, whole=whole: whole.append(inputs[0].shape[1])
        )
        for name, person in ((kind, build_identity()), (f"{kind} plain", None)):
            assert_near(first[name], mirror.sample(CLIP, person), 1e-4)
            assert torch.equal(first[name], second[name])
        shares = torch.stack([first[f"{kind} tokens"], second[f"{kind} tokens"]])
        assert shares.sum(0).tolist() == whole
        assert (shares[0] - shares[1]).abs().max() <= 3


def test_one_process_shares_nothing(folders: dict[str, Path]) -> None:
    with pytest.raises(SettingError, match=r"this is one process.*torchrun"):
        MagicMirror(FolderBase(folders["5b"]), context_parallel=True, device=torch.device("cpu"))


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were another process."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)


def test_what_does_not_go_with_it(pair: None, folders: dict[str, Path]) -> None:
    base, cpu = FolderBase(folders["5b"]), torch.device("cpu")
    with pytest.raises(SettingError, match="Switch one off"):
        MagicMirror(base, context_parallel=True, compile=True, device=cpu)
    mirror = MagicMirror(base, context_parallel=True, device=cpu)
    with pytest.raises(SettingError, match="Set step_cache to off"):
        mirror.sample(replace(CLIP, step_cache="fast"))
