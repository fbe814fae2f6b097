"""Running out of memory is recognised as every device and library says it, and nothing else is."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch

from mm_core.errors import OutOfMemoryError
from mm_core.out_of_memory import is_out_of_memory, out_of_memory_as

# As they are raised, shortened where numbers or advice follow.
REPORTED = {
    "cuda": torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.25 GiB. GPU 0 has a total capacity of 23.64 GiB of which 1 is free."
    ),
    "cuda runtime": RuntimeError(
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call."
    ),
    "cublas": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "cudnn": RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    "cudnn 9": RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    "cudnn workspace": RuntimeError("Unable to find a valid cuDNN algorithm to run convolution"),
    "hip": RuntimeError("HIP error: out of memory\nHIP kernel errors might be asynchronously reported."),
    "hipblas": RuntimeError("CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`"),
    "mps": RuntimeError(
        "MPS backend out of memory (MPS allocated: 17.20 GB, other allocations: 512.00 KB, max allowed: 18.13 GB). "
        "Tried to allocate 1.05 GB on private pool. Use PYTORCH_MPS_HIGH_WATERMARK_RATIO=0.0 to disable upper limit."
    ),
    "metal buffer": RuntimeError("Invalid buffer size: 24.44 GB"),
    "xpu": RuntimeError("Native API failed. Native API returns: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)"),
    "windows": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:116] data. DefaultCPUAllocator: not enough memory: you tried to allocate 9."
    ),
    "python": MemoryError(),
}
OTHERS = {
    "shapes": RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
    "kernel": RuntimeError("CUDA error: an illegal memory access was encountered"),
    "cudnn": RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"),
    "cublas": RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    "file": OSError("out of memory"),
    "value": ValueError("out of memory"),
}


@pytest.mark.parametrize("name", REPORTED)
def test_it_is_recognised(name: str) -> None:
    assert is_out_of_memory(REPORTED[name])


@pytest.mark.parametrize("name", OTHERS)
def test_other_errors_are_not(name: str) -> None:
    assert not is_out_of_memory(OTHERS[name])


@pytest.mark.parametrize("allocate", [lambda: torch.empty(2**60), lambda: bytearray(2**60)], ids=["torch", "python"])
def test_this_machines_own(allocate: Callable[[], object]) -> None:
    with pytest.raises((RuntimeError, MemoryError)) as error:
        allocate()
    assert is_out_of_memory(error.value)


def test_it_becomes_a_message_and_lets_go_of_what_it_held() -> None:
    held = []

    def work() -> None:
        tensor = torch.zeros(3)
        held.append(weakref.ref(tensor))
        raise REPORTED["mps"]

    words = r"^MPS backend .* upper limit\.$"
    with pytest.raises(OutOfMemoryError, match=words) as error, out_of_memory_as(OutOfMemoryError):
        work()
    gc.collect()
    assert error.value.__cause__ is REPORTED["mps"]
    assert held[0]() is None


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="shapes") as error, out_of_memory_as(OutOfMemoryError):
        raise OTHERS["shapes"]
    assert error.value is OTHERS["shapes"]
