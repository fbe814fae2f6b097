"""Draw the people of mm_core/examples and encode them for tiny. Run it again when tiny's ID encoder changes; with the
Python of the tests.
"""

from __future__ import annotations

import dataclasses
import sys

import environment

sys.path.insert(0, str(environment.ROOT))

from PIL import Image

from lab.people.person import Person
from lab.people.render import render_clip
from lab.people.scene import sample_clip
from mm_core.examples import FOLDER, PEOPLE, example_photos
from mm_core.faces.analysis import FaceAnalyzer
from mm_core.faces.references import analyse_references
from mm_core.pipelines.base import TinyBase
from mm_core.pipelines.identity_file import save_identity
from mm_core.pipelines.magic_mirror import MagicMirror

SIZE = 384
FACE_PACK = "buffalo_sc"  # its recogniser is the one that tiny's ID encoder was trained on
# Held-out seeds, clips of theirs whose first frame looks into the camera, and a zoom that leaves room around the head.
SEEDS = {"woman": (1_000_203, (2, 5), 0.8), "man": (1_000_200, (3, 2), 0.68)}


def main() -> None:
    """Photos first; the identities are made of the files, as a user's would be."""
    for name, (seed, clips, zoom) in SEEDS.items():
        person = Person.from_seed(seed)
        for number, clip in enumerate(clips, 1):
            first = dataclasses.replace(sample_clip(seed, clip, size=SIZE), frames=1, zoom=zoom)
            (frame,) = render_clip(person, first)
            Image.fromarray(frame).save(FOLDER / f"{name}_{number}.jpg", quality=90)
    analyzer = FaceAnalyzer(environment.face_models(), FACE_PACK)
    mirror = MagicMirror(TinyBase())
    for name in PEOPLE:
        identity = mirror.identity(analyse_references(analyzer, list(example_photos(name))), FACE_PACK)
        save_identity(identity, FOLDER / f"{name}.safetensors")
        print(name, identity.report, sep="\n")


if __name__ == "__main__":
    main()
