"""Several training sets as one: the paper's image stage learns pictures, portraits and pairs together."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from ..data.manifest import MANIFEST, read_manifest
from ..errors import SettingError
from ..files import write_lines


def join(folder: Path) -> dict[str, int]:
    """Write one manifest for all the sets that lie in a folder; their files stay where they are.

    Returns how many samples each set has. Raises SettingError for less than two sets, a set's wrong line, and a folder
    that is a set itself.
    """
    sets = sorted(path.parent for path in folder.glob(f"*/{MANIFEST}"))
    if len(sets) < 2:
        raise SettingError(
            f"{folder} holds {len(sets)} training sets, of two or more that could be joined: curate each with --out in "
            f"a folder below it, such as {folder / 'pictures'}."
        )
    names = {path.name for path in sets}
    joined = folder / MANIFEST
    if joined.is_file() and any(Path(sample.media).parts[0] not in names for sample in read_manifest(joined)):
        raise SettingError(f"{joined} is that of another set; join those below a folder that is none itself.")
    samples = {path.name: read_manifest(path) for path in sets}
    write_lines(
        joined,
        (
            {field: value for field, value in asdict(sample).items() if value is not None}
            | {"id": f"{name}/{sample.id}", "media": f"{name}/{sample.media}"}
            | {"references": [f"{name}/{path}" for path in sample.references]}
            for name, found in samples.items()
            for sample in found
        ),
    )
    return {name: len(found) for name, found in samples.items()}
