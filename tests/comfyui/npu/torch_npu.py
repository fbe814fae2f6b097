"""In place of the package of this name, which brings Ascend's NPUs to torch: here the NPU is the simulated accelerator.

A ComfyUI that has this folder on its path computes there as it is, without `--cpu`, and all of its flags act.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))

import accelerator as _simulation

_simulation.NAME = "npu"
_entered = _simulation.simulated()  # kept, or its end would come
accelerator = _entered.__enter__()


def __getattr__(name: str) -> Any:
    """Kernels that diffusers imports where there is an NPU, and does not call unless it is asked to."""
    if name.startswith("__"):
        raise AttributeError(name)
