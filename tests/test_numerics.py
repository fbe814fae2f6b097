"""Latents that are not finite are told with their step, and nearly no value is read for it."""

from __future__ import annotations

import re

import pytest
import torch
from accelerator import simulated

from mm_core.errors import NumericsError
from mm_core.numerics import FiniteWatch


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_first_bad_step_is_told(steps: int, value: float) -> None:
    """At the next reading, by the number of the step that first had it."""
    for bad in range(1, steps + 1):
        watch, told = FiniteWatch(steps, torch.float16), None
        for step in range(1, steps + 1):
            latents = torch.full((1, 4, 3, 2, 2), value if step >= bad else 60000.0, dtype=torch.float16)
            try:
                watch.note(latents)
            except NumericsError as error:
                told = str(error)
                break
        assert re.search(rf"After step {bad} of {steps} .*: fp16 ends .*bf16", told)


@pytest.mark.parametrize(("dtype", "advice"), [(torch.bfloat16, "in bf16. Try fp32"), (torch.float32, "Model Doctor")])
def test_the_remedy_is_of_the_precision(dtype: torch.dtype, advice: str) -> None:
    with pytest.raises(NumericsError, match=advice):
        FiniteWatch(1, dtype).note(torch.tensor(float("nan")))


def test_values_read_do_not_grow_with_the_steps() -> None:
    read = {}
    for steps in (10, 100):
        with simulated() as accelerator:
            watch, latents = FiniteWatch(steps, torch.float32), torch.zeros(1, 2, 2, device=accelerator.device)
            for _ in range(steps):
                watch.note(latents)
            read[steps] = accelerator.traffic["to host"] + accelerator.traffic["values read"]
    assert read[10] == read[100] <= 5
