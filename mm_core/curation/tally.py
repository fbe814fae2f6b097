"""How many items were kept and dropped, why, and how what is measured is distributed."""

from __future__ import annotations

from array import array
from collections import Counter
from typing import Any

from .config import CurationConfig, Kind
from .measure import Row
from .rules import Limit, rules

EXAMPLES = 6
KEPT, DROPPED = "kept", "dropped"
Example = tuple[int, Row, str]
"""Number of the shard, the row, and what is to be said of it."""


class Tally:
    """What the report shows.

    values: of each limit, over all items that it can be measured of.
    shown: by KEPT or DROPPED, and the name of a threshold, the items nearest to it on that side: those that another
        one would drop or keep. By DROPPED and the name of another rule, and by KEPT and "", the first ones.
    seconds: of a core, by stage, and `items`, of what this run has measured itself.
    """

    def __init__(self, kind: Kind, config: CurationConfig) -> None:
        self.kind, self.config = kind, config
        self.seconds: Counter[str] = Counter()
        self.items = self.kept = 0
        self.dropped: Counter[str] = Counter()
        self.licences: Counter[str] = Counter()
        self.sources: Counter[str] = Counter()
        self.shown: dict[tuple[str, str], list[tuple[float, Example]]] = {}
        self.limits = [rule for rule in rules(kind, config.measure) if isinstance(rule, Limit)]
        self.values = {limit.name: array("f") for limit in self.limits}

    def measure(self, row: Row) -> None:
        self.items += 1
        if "error" not in row:
            for limit in self.limits:
                value = limit.value(row, self.config.keep)
                if value is not None:
                    self.values[limit.name].append(value)

    def drop(self, shard: int, row: Row, why: tuple[str, str]) -> dict[str, str]:
        """A line about the item."""
        self.dropped[why[0]] += 1
        limit = next((limit for limit in self.limits if limit.name == why[0]), None)
        far = {why[0]: 0.0} if limit is None else limit.distances(row, self.config.keep)
        for name, distance in far.items():
            if distance <= 0:
                self._show((DROPPED, name), -distance, (shard, row, why[1]))
        return {"name": row["name"], "id": row.get("id", ""), "rule": why[0], "why": why[1]}

    def keep(self, shard: int, row: Row) -> None:
        self.kept += 1
        self.licences[row["licence"] or "unknown"] += 1
        self.sources[row["source"] or "unknown"] += 1
        self._show((KEPT, ""), 0.0, (shard, row, ""))
        for limit in self.limits:
            for name, distance in limit.distances(row, self.config.keep).items():
                said = f"{limit.value(row, self.config.keep):g} {limit.unit}"
                self._show((KEPT, name), distance, (shard, row, said))

    def _show(self, key: tuple[str, str], distance: float, example: Example) -> None:
        shown = self.shown.setdefault(key, [])
        if len(shown) < EXAMPLES or distance < shown[-1][0]:
            shown.append((distance, example))
            shown.sort(key=lambda each: each[0])
            del shown[EXAMPLES:]

    def per_item(self) -> dict[str, float]:
        """Seconds of a core that an item took, by stage; {} where nothing was measured in this run."""
        stages = {name: value for name, value in self.seconds.items() if name != "items"}
        return {name: value / self.seconds["items"] for name, value in sorted(stages.items())}

    def to_json(self) -> dict[str, Any]:
        """The same for the same inputs and settings: without the seconds."""
        return {
            "items": self.items,
            "kept": self.kept,
            "dropped": dict(sorted(self.dropped.items())),
            "licences": dict(sorted(self.licences.items())),
        }

    def __str__(self) -> str:
        lines = [f"{self.kept:,} of {self.items:,} kept"]
        lines += [f"  {count:>9,} dropped: {rule}" for rule, count in self.dropped.most_common()]
        if self.kept:
            lines.append(f"licences: {', '.join(f'{name} ({count:,})' for name, count in self.licences.most_common())}")
        seconds = self.per_item()
        if seconds:
            stages = ", ".join(f"{name} {1000 * value:.0f}" for name, value in seconds.items())
            total = sum(seconds.values())
            lines.append(f"milliseconds of a core an item: {stages}; {1 / total:.2f} items a second and core")
            goal = 600_000 if self.kind == "video" else 5_000_000
            what = "clips" if self.kind == "video" else "pictures"
            lines.append(f"{goal:,} {what} would take {goal * total / 3600:,.0f} hours of a core")
        return "\n".join(lines)
