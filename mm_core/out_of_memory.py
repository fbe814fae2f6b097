"""Out of memory, in all the forms in which devices and libraries report it."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from .errors import OutOfMemoryError

# Only torch's own allocators raise a type of their own; the others are told by what they say.
_MESSAGES = (
    "out of memory",  # CUDA's and HIP's runtime, MPS
    "outofmemory",  # hipErrorOutOfMemory
    "out_of_device_memory",  # Level Zero: UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY
    "out_of_host_memory",
    "can't allocate memory",  # the CPU's allocator on Linux and macOS
    "not enough memory",  # the same on Windows
    "_status_alloc_failed",  # CUBLAS_STATUS_ALLOC_FAILED, and the same of cuDNN and hipBLAS
    "device_allocation_failed",  # cuDNN 9: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED
    "host_allocation_failed",
    "unable to find a valid cudnn algorithm",  # no workspace fits
    "invalid buffer size",  # Metal: larger than one buffer may be
    "failed to allocate private mtlbuffer",
    "not enough gpu video memory",  # DirectML
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device, or the machine, has too little memory."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _MESSAGES)


@contextmanager
def out_of_memory_as(message: Callable[[str], OutOfMemoryError]) -> Iterator[None]:
    """Turn running out of memory in the block into the error that `message` makes of the reason, a line of text. What
    the failed attempt held is let go before."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # they would keep its tensors alive as long as the error
        reason = str(error).strip().splitlines()
        raise message(reason[0] if reason else type(error).__name__) from error
