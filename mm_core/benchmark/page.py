"""What was counted and timed, as a page in Markdown with a picture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from ..pipelines.plan import PHASES
from .measure import CASES, FRAMES, HEIGHT, STEPS, WIDTH

PAPER = {"seconds": (204, 209), "GiB": (24.9, 28.6)}
"""Plain and adapted, from the paper's Tab. 6: its own implementation, on an A800."""
GIB = 2**30


def to_markdown(found: Mapping[str, Any], picture: str | None) -> str:
    """found: as `__main__.measure` returns it, and JSON keeps it. picture: its file, beside the page."""
    size = f"{FRAMES} frames of {HEIGHT} x {WIDTH}"
    parts = [
        f"# Benchmark\n\nWritten by `{found['command']}`, with {found['machine']}.",
        f"![Predicted memory, and time by the roofline]({picture})" if picture else "",
        f"## Counted at full size\n\nOne step with guidance, {size}, op by op on torch's `meta` device, with fused "
        "attention, divided by the data sheets' limits (the roofline: no kernel is faster). Nothing of it is timed.",
        *(_counts(name, counts) for name, counts in found["counts"].items()),
        "## Predicted memory\n\nGiB on the device at once, bf16, in each phase under each policy of offloading; "
        "decoding in the smallest tiles.",
        *(_memory(name, peaks) for name, peaks in found["memory"].items()),
        "What `auto` chooses on cards of some sizes, 8% of them taken by others, and GiB at once:\n\n" + found["cards"],
        _ratios(found["ratios"]),
        _phases(found["phases"]),
        f"## CogVideoX-5b on a GPU\n\n{size}, {STEPS} steps with guidance and decoding, bf16, random weights, plain "
        "and adapted in turns, beside the paper's own implementation on its A800.\n\n" + _full_size(found["full_size"]),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _counts(name: str, by_storage: Mapping[str, Any]) -> str:
    def row(label: str, key: str, unit: float) -> list[str]:
        cells = [label]
        for counts in by_storage.values():
            plain, adapted = (counts[case][key] / unit for case in CASES)
            cells += [f"{plain:.2f}", f"{adapted:.2f}", f"{adapted / plain:.4f}"]
        return cells

    any_counts = next(iter(by_storage.values()))
    timed = [key for key in any_counts["plain"] if key.startswith("seconds on")]
    extra = ["GiB at the loop's peak beyond the base's"]
    for counts in by_storage.values():
        extra += ["", f"{counts['extra']['bytes'] / GIB:.2f}", ""]
    rows = [row("TFLOP", "flops", 1e12), row("GB moved", "bytes", 1e9), row("GiB of activations", "activations", GIB)]
    rows += [row(f"{key}, roofline", key, 1) for key in timed]
    head = [name, *(f"{storage} {word}" for storage in by_storage for word in (*CASES, "ratio"))]
    return _table(head, [*rows, extra])


def _memory(name: str, by_policy: Mapping[str, Mapping[str, int]]) -> str:
    rows = [
        [policy, *(f"{peaks[phase] / GIB:.1f}" for phase in PHASES), f"{max(peaks.values()) / GIB:.1f}"]
        for policy, peaks in by_policy.items()
    ]
    return _table([name, *PHASES, "at most"], rows)


def _ratios(found: Mapping[str, Any]) -> str:
    plain, adapted = (found["timed"][case]["seconds"] for case in CASES)
    each = sorted(ours / base for ours, base in zip(adapted, plain, strict=True))
    return (
        f"## Ratio on this machine\n\nOne step with guidance of {found['layers']} blocks of {found['width']} channels, "
        f"{found['tokens']} video tokens, {found['dtype']} on {found['device']}, plain and adapted in turns, "
        f"{len(each)} rounds: the adapted step takes {median(each):.3f} times the plain one's {median(plain):.2f} s "
        f"({each[0]:.3f} to {each[-1]:.3f})."
    )


def _phases(found: Mapping[str, Any]) -> str:
    cases = found["seconds"]
    rows = [[name, *(f"{cases[case][name]:.3f}" for case in cases)] for name in PHASES]
    rows.append(["all", *(f"{sum(cases[case].values()):.3f}" for case in cases)])
    return (
        f"## Seconds by phase on this machine\n\n{found['base']} on {found['device']}: {found['clip']}; medians of "
        f"{found['rounds']} rounds in turns.\n\n" + _table(["seconds", *cases], rows)
    )


def _full_size(found: Mapping[str, Any] | None) -> str:
    rows = [["paper, A800", *PAPER["seconds"], "", *PAPER["GiB"]]]
    if found is None:
        rows.append(["here", *["not measured"] * 2, "", *["not measured"] * 2])
    else:
        plain, adapted = (found[case] for case in CASES)
        peaks = [f"{case['peak'] / GIB:.1f}" if "peak" in case else "not told" for case in (plain, adapted)]
        ratio = f"{adapted['step'] / plain['step']:.4f}"
        rows.append([found["device"], f"{plain['clip']:.0f}", f"{adapted['clip']:.0f}", ratio, *peaks])
    return _table(["", "s plain", "s adapted", "ratio of a step", "GiB plain", "GiB adapted"], rows)


def draw(found: Mapping[str, Any], path: Path) -> None:
    """The picture, as PNG. Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    memory, seconds = figure.subplots(1, 2)
    name, by_policy = next(iter(found["memory"].items()))
    for number, (policy, peaks) in enumerate(by_policy.items()):
        places = [phase + 0.2 * (number - 1.5) for phase in range(len(PHASES))]
        memory.bar(places, [peaks[phase] / GIB for phase in PHASES], 0.2, label=policy)
    memory.set_xticks(range(len(PHASES)), PHASES)
    memory.set(title=f"{name}, bf16: predicted memory", ylabel="GiB")
    memory.legend(title="offload", ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.1))
    counts = found["counts"][name]["bf16"]
    gpus = [key for key in counts["plain"] if key.startswith("seconds on")]
    for number, case in enumerate(CASES):
        times = [STEPS * counts[case][gpu] for gpu in gpus] + [PAPER["seconds"][number]]
        seconds.bar([place + 0.4 * (number - 0.5) for place in range(len(times))], times, 0.4, label=case)
    labels = [gpu.removeprefix("seconds on ") for gpu in gpus]
    seconds.set_xticks(range(len(gpus) + 1), [*labels, "A800 of\nthe paper"])
    seconds.set(title=f"{STEPS} steps by the roofline; last, the paper's clip", ylabel="seconds")
    seconds.legend()
    figure.savefig(path, dpi=110, metadata={"Software": None})
