"""How far a command is, as bars in a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def bars(quiet: bool = False) -> Iterator[Callable[[str, int, int], None]]:
    """A function that shows what is being made, how many of it are done, and of how many, as a bar each."""
    shown: dict[str, tqdm] = {}

    def show(what: str, done: int, of: int) -> None:
        bar = shown.setdefault(what, tqdm(desc=what, total=of, disable=quiet or None))
        bar.update(done - bar.n)
        if done == of:  # not under the bars of what comes next
            bar.close()

    try:
        yield show
    finally:
        for bar in shown.values():
            bar.close()
