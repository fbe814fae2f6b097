"""The whole way from a data set to an adapter that can be published; what is finished is skipped."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from ..data.features import INDEX
from ..data.precompute import is_made, precompute
from ..files import is_current
from ..training.adapter_task import train_stage
from ..training.config import TrainingConfig
from ..training.runs import is_finished
from ..training.sources import features_of, output_of
from .prepare import check, feature_settings
from .publish import export, exported, write_card
from .score import REPORT, clips_of, make_clips, scores_of, write_scores

_log = logging.getLogger(__name__)
_POLL = 2.0  # seconds


def train_whole(
    config: TrainingConfig,
    rank: int = 0,
    world_size: int = 1,
    on_progress: Callable[[str, str, int, int], None] = lambda stage, what, done, of: None,
) -> Path:
    """Check, precompute, train both stages, export, score; returns the page of the scores.

    rank, world_size: of this process, which does its share of everything.
    on_progress(stage, what, done, of): of checking and precomputing.

    Raises MagicMirrorError as the parts do.
    """
    stages = ("video",) if config.ablation == "G" else ("image", "video")
    for stage in stages:
        features, settings = features_of(config, stage), feature_settings(config, stage)
        if not is_made(settings, features):
            if rank == 0:
                _log.info("%s: %s", stage, check(config, stage, partial(on_progress, stage, "checked")))
            precompute(settings, features, partial(on_progress, stage), rank=rank, world_size=world_size)
            _wait((features / INDEX).is_file)
    output = output_of(config)
    for stage in stages:
        if not is_finished(output / stage, config.stage(stage).loop.steps):
            train_stage(config, stage)
            gc.collect()  # its models, before those that make the clips
            if torch.accelerator.is_available():
                torch.get_device_module().empty_cache()
    if rank == 0:
        _log.info("%s", export(config))
    _wait(lambda: exported(config)[1])
    adapter, _ = exported(config)
    clips = clips_of(config, adapter)
    make_clips(config, adapter, clips, rank, world_size)
    _wait(lambda: all(is_current(clip, adapter) for clip in clips))
    if rank == 0:
        report = write_scores(config, adapter)
        write_card(config, adapter, report.with_name("results.json"))
    return scores_of(config, adapter) / REPORT


def _wait(done: Callable[[], bool]) -> None:
    """Until the other processes have done it; without a limit, since who starts them ends all when one fails."""
    while not done():
        time.sleep(_POLL)
