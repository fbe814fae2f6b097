"""A custom node for the tests: ComfyUI computes on the simulated accelerator of the tests, and tells its traffic."""

import sys

import comfy.model_management as management
import torch

sys.path.append("TESTS")

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


class TrafficProbe:
    """Counts since the last call: copies to the device, to the host, values read."""

    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION = "count"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"after": ("LATENT",)}}

    @classmethod
    def IS_CHANGED(cls, **_):
        return float("nan")

    def count(self, after):
        counts = [str(accelerator.traffic[name]) for name in ("to device", "to host", "values read")]
        accelerator.traffic.clear()
        return {"ui": {"text": counts}}


NODE_CLASS_MAPPINGS = {"TrafficProbe": TrafficProbe}
