"""Shards to processes, on this machine or on a cluster: Ray Data."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import MagicMirrorError
from ..files import write_text
from ..json_file import read_lines
from .clips import measure_video
from .config import CurationConfig, Kind
from .items import Shard
from .measure import Measurer
from .write import write_shard

_OBJECT_STORE = 128 * 2**20  # bytes: only names of shards and sums pass between processes
_MOST_BLOCKS = 1000
_CODE = str(Path(__file__).resolve().parents[2])


class MeasureShard:
    """A worker that writes the rows of shards, and returns the seconds of a core that each stage took."""

    def __init__(self, kind: Kind, config: CurationConfig) -> None:
        self.kind, self.measurer = kind, Measurer(config.measure)

    def __call__(self, row: Mapping[str, str]) -> dict[str, str]:
        task = json.loads(row["task"])
        self.measurer.seconds = Counter()
        rows = []
        for item in Shard(**task["shard"]).items():
            if self.kind == "video":
                rows += measure_video(self.measurer, item)
            else:
                rows.append(self.measurer.pair(item) if self.kind == "pairs" else self.measurer.picture(item))
        write_text(Path(task["file"]), "".join(json.dumps(row) + "\n" for row in rows))
        return {"result": json.dumps(self.measurer.seconds | Counter(items=len(rows)))}


def write_task(row: Mapping[str, str], kind: Kind, config: CurationConfig, output: Path) -> dict[str, str]:
    """Write the media of a shard."""
    task = json.loads(row["task"])
    measured = read_lines(Path(task["measured"]))
    write_shard(kind, Shard(**task["shard"]), [measured[place] for place in task["places"]], output, config)
    return {"result": "{}"}


class Workers:
    """Ray, started when there is something to do, and stopped again.

    address: of a cluster that runs; None: this machine alone. count: of processes; None: one for each core.
    """

    def __init__(self, address: str | None, count: int | None) -> None:
        self.address, self.count, self._started = address, count, False

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._started:
            import ray

            ray.shutdown()

    def each(
        self,
        work: Callable[..., Any],
        arguments: tuple[Any, ...],
        tasks: Sequence[Mapping[str, Any]],
        on_progress: Callable[[int, int], None],
    ) -> Iterator[dict[str, Any]]:
        """What is returned of the tasks, in the order in which they finish.

        work: a class, of which each process makes one object with these arguments, or a function that takes them.

        Raises the MagicMirrorError of a worker, or one that says that there is no cluster.
        """
        if not tasks:
            return
        self.start()
        import ray

        rows = [{"task": json.dumps(task)} for task in tasks]
        count = min(self.count or int(ray.cluster_resources().get("CPU", 1)), len(tasks))
        data = ray.data.from_items(rows, override_num_blocks=min(len(rows), _MOST_BLOCKS))
        if isinstance(work, type):
            pool = ray.data.ActorPoolStrategy(size=count)
            found = data.map(work, fn_constructor_args=arguments, compute=pool)
        else:
            found = data.map(work, fn_args=arguments, compute=ray.data.TaskPoolStrategy(size=count))
        on_progress(0, len(tasks))
        try:
            for done, row in enumerate(found.iter_rows(), 1):
                yield json.loads(row["result"])
                on_progress(done, len(tasks))
        except ray.exceptions.RayError as error:
            raise _cause(error) from error

    def start(self) -> None:
        """Unless it runs already."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no connection that nobody asked for
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # of every pool of workers it warns on stderr
        import ray
        import ray.data

        ray.data.DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        if ray.is_initialized():
            return
        if self.address is None:
            ray.init(
                address="local",
                num_cpus=self.count,
                object_store_memory=_OBJECT_STORE,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        else:
            # Workers of this machine find the code where this process does; those of another by its path.
            code = {"env_vars": {"PYTHONPATH": _CODE}}
            try:
                ray.init(address=self.address, log_to_driver=False, logging_level=logging.ERROR, runtime_env=code)
            except (ConnectionError, ValueError) as error:  # the latter for an address of another form
                raise MagicMirrorError(
                    f"There is no Ray cluster at {self.address} that takes this process: {error}. Give the address "
                    "that `ray start --head` printed; where it has a token, that in RAY_AUTH_TOKEN, with "
                    "RAY_AUTH_MODE=token."
                ) from error
        self._started = True


def _cause(error: BaseException) -> BaseException:
    """The MagicMirrorError that a worker raised, else the error itself."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, MagicMirrorError):
            return found
        found = getattr(found, "cause", None) or found.__cause__
    return error
