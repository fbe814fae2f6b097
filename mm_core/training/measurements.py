"""What a run measures from one line of its log to the next: means over samples, speed, memory."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

_TIMESTEP_BUCKETS = 10


class Measurements:
    """Of this process, where not said otherwise. device: its memory is told where torch keeps count of it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._forget()

    def _forget(self) -> None:
        self._sums: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self._samples = 0
        self._seconds = {"step": 0.0, "data": 0.0}

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """what: `step`, or `data`, a part of it."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[what] += time.perf_counter() - begun

    def add(self, columns: Mapping[str, Tensor]) -> None:
        """Per-sample values of all processes; NaN where there is none. `timestep` tells noise by its level too."""
        columns = dict(columns)
        self._samples += len(columns["loss"])
        timesteps = columns.pop("timestep", None)
        for name, column in columns.items():
            self._add(name, column)
        if timesteps is not None:
            buckets = (timesteps / 1000 * _TIMESTEP_BUCKETS).long().clamp(0, _TIMESTEP_BUCKETS - 1)
            for bucket in buckets.unique().tolist():
                name = f"noise_loss/t{bucket * 100:03d}-{bucket * 100 + 99:03d}"
                self._add(name, columns.get("noise_loss", columns["loss"])[buckets == bucket])

    def _add(self, name: str, column: Tensor) -> None:
        measured = column[~column.isnan()]
        self._sums[name][0] += float(measured.sum())
        self._sums[name][1] += len(measured)

    def take(self) -> dict[str, float]:
        """The means since the last call, and `speed/`: samples a second over all processes, the part of the time that
        was spent waiting for batches, and the largest memory of the device so far, in GiB."""
        values = {name: total / count for name, (total, count) in sorted(self._sums.items()) if count}
        if values:
            seconds = max(self._seconds["step"], 1e-9)
            values["speed/samples_a_second"] = self._samples / seconds
            values["speed/waiting_for_data"] = self._seconds["data"] / seconds
        if values and self.device.type != "cpu":
            peak = torch.get_device_module(self.device).max_memory_allocated(self.device)
            values["speed/peak_memory_gib"] = peak / 2**30
        self._forget()
        return values
