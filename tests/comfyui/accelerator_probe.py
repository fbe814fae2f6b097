"""Imported by a probe: from then on core, which was told to use the CPU, computes on the simulated accelerator."""

import comfy.model_management as management
import torch
from accelerator import simulated

_entered = simulated()  # kept, or its end would come
accelerator = _entered.__enter__()
module = torch.get_device_module(accelerator.device)

# The mode stays that of `--cpu`, which asks no CUDA what it can.
management.vram_state = management.VRAMState.NORMAL_VRAM
management.get_torch_device = lambda: accelerator.device
management.get_all_torch_devices = lambda exclude_current=False: [] if exclude_current else [accelerator.device]
_free, _total = management.get_free_memory, management.get_total_memory


def _memory(which, of_cpu):
    def memory(dev=None, *flags, **options):
        if dev is not None and torch.device(dev).type == "cpu":
            return of_cpu(dev, *flags, **options)
        size = module.mem_get_info()[which]
        return (size, 0) if any(flags) or any(options.values()) else size

    return memory


management.get_free_memory, management.get_total_memory = _memory(0, _free), _memory(1, _total)
management.soft_empty_cache = lambda *_, **__: None
