"""Score the small model on people it never saw: identity by three recognisers, motion, whether prompts are followed.

One reference picture of each held-out person; clips are made from the captions of the person's other clips. Cosines are
centred: the mean embedding of training people, who look rendered too, is subtracted first. Prints Markdown tables and
writes everything to --out as JSON. Real clips give the ceiling, other people's real clips the floor.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from mm_core.evaluation.metrics import largest_found, mean_found, motion_between
from mm_core.evaluation.recognisers import ArcFaceJudge, DlibJudge, SFaceJudge, find_face
from mm_core.faces.analysis import FaceAnalyzer, estimate_pose
from mm_core.faces.references import analyse_references
from mm_core.files import write_json
from mm_core.pipelines.base import FolderBase, TinyBase
from mm_core.pipelines.clip import ClipSettings
from mm_core.pipelines.control import AdapterSettings
from mm_core.pipelines.magic_mirror import MagicMirror
from scripts import environment

from ..people.captions import caption, nod, smiles, tilt, turn
from ..people.person import Person
from ..people.render import render_clip
from ..people.scene import ClipDescription, sample_clip
from ..people.traits import HELD_OUT

REFERENCE_CLIP, CEILING_CLIP, PROMPT_CLIPS = 0, 1, (2, 3)
REFERENCE_FRAME = 4
STEPS, GUIDANCE = 12, 3.0  # as in the workflows of tiny
CENTRING_PEOPLE = 50  # training people whose mean embedding is subtracted
ENDS = 2  # frames at each end of a clip that are taken together: movements begin and end softly, landmarks tremble
MOVED = 4.0  # degrees, estimated from five landmarks, that count as a turn or a tilt
NODDED = 0.03  # of the way from chin to bridge, that the tip of the nose moves in a nod
WIDER = 1.03  # mouth over eye distance, last to first, that counts as a smile
CHIN, BRIDGE, NOSE = 8, 27, 30  # of dlib's 68 landmarks
ASKED = ("turn", "nod", "tilt", "smile", "all")


@dataclass(kw_only=True)
class Row:
    """What a kind of clip scored. cosines: by judge, a list a person. found, ranked: frames. motion: one a clip."""

    frames: int = 0
    found: int = 0
    cosines: dict[str, list[list[float]]] = field(default_factory=dict)
    ranked: dict[str, list[bool]] = field(default_factory=dict)
    motion: list[float] = field(default_factory=list)
    followed: dict[str, list[bool]] = field(default_factory=dict)


def main() -> None:
    args = _parse()
    scorer = Scorer(args.people)
    base = TinyBase() if args.base is None else FolderBase(args.base)
    mirror = MagicMirror(base, adapter=args.adapter, id_encoder=args.id_encoder, device=torch.device("cpu"))
    print(mirror.status)
    score_real(scorer, mirror)
    score_generated(scorer, "base, no identity", mirror, None, args.steps, args.guidance)
    score_generated(scorer, "ours", mirror, AdapterSettings(), args.steps, args.guidance)
    report = scorer.report()
    print(tables(report))
    write_json(args.out, {"model": mirror.status, "people": args.people, "rows": report})


def score_real(scorer: Scorer, mirror: MagicMirror) -> None:
    """Rendered clips: the ceiling, the floor, what the VAE leaves of them, and what prompts look like when followed."""
    for number, seed in enumerate(tqdm(scorer.people, desc="real", unit="person")):
        person = Person.from_seed(seed)
        real = render_clip(person, sample_clip(seed, CEILING_CLIP))
        scorer.score("real, another clip", number, real)
        scorer.score("through the VAE", number, round_trip(mirror, real))
        for clip in PROMPT_CLIPS:
            asked = sample_clip(seed, clip)
            scorer.score("real, the prompt's clip", number, render_clip(person, asked), asked)


def score_generated(
    scorer: Scorer, name: str, mirror: MagicMirror, settings: AdapterSettings | None, steps: int, guidance: float
) -> None:
    """Clips of each person from two captions and one picture. settings: None leaves the identity out."""
    for number, seed in enumerate(tqdm(scorer.people, desc=name, unit="person")):
        identity = None
        if settings is not None:
            reference = render_clip(Person.from_seed(seed), sample_clip(seed, REFERENCE_CLIP))[REFERENCE_FRAME]
            identity = mirror.identity(analyse_references(scorer.analyzer, [reference]))
        for clip in PROMPT_CLIPS:
            asked, limits = sample_clip(seed, clip), mirror.base.limits
            wanted = ClipSettings(
                prompt=caption(asked), width=limits.width, height=limits.height, num_frames=limits.num_frames,
                steps=steps, guidance_scale=guidance, dynamic_guidance=False, scheduler="ddim",
                seed=1000 * number + clip,
            )  # fmt: skip
            frames = mirror.generate(wanted, identity, settings).frames
            scorer.score(name, number, (frames.numpy() * 255).round().astype(np.uint8), asked)


class Scorer:
    """Knows each person by the mean of the frames of one real clip."""

    def __init__(self, people: int) -> None:
        self.analyzer = FaceAnalyzer(environment.face_models(), "buffalo_sc", device="cpu")
        self._dlib = DlibJudge()
        judges = self.judges = [ArcFaceJudge(), self._dlib, SFaceJudge()]
        self.people = range(HELD_OUT, HELD_OUT + people)
        self.rows: dict[str, Row] = {}
        centring = [self._of_person(seed, [REFERENCE_FRAME]) for seed in tqdm(range(CENTRING_PEOPLE), desc="centre")]
        self.centre = {j.name: np.mean([e[j.name].mean(0) for e in centring], axis=0) for j in judges}
        known = [self._of_person(seed, [0, 4, 8]) for seed in tqdm(self.people, desc="known people")]
        self.known = {
            j.name: _unit(np.stack([_unit(e[j.name] - self.centre[j.name]).mean(0) for e in known])) for j in judges
        }

    def _of_person(self, seed: int, frames: list[int]) -> dict[str, np.ndarray]:
        clip = render_clip(Person.from_seed(seed), sample_clip(seed, REFERENCE_CLIP))
        return {name: _unit(np.stack(e)) for name, e in self._embed(clip[frames])[0].items()}

    def _embed(self, frames: np.ndarray) -> tuple[dict[str, list[np.ndarray]], np.ndarray]:
        """Embeddings of the frames with a face, by judge, and (F, 5 + 68, 2) landmarks in pixels, NaN without one."""
        embeddings: dict[str, list[np.ndarray]] = {judge.name: [] for judge in self.judges}
        landmarks = np.full((len(frames), 5 + 68, 2), np.nan)
        for number, frame in enumerate(frames):
            seen = find_face(self.analyzer, frame)
            if seen is not None:
                picture, face = seen
                points = np.concatenate([face.landmarks, self._dlib.landmarks(picture, face)])
                landmarks[number] = points * (len(frame) / len(picture))
                for judge in self.judges:
                    embeddings[judge.name].append(judge.describe(picture, face))
        return embeddings, landmarks

    def score(self, name: str, person: int, frames: np.ndarray, asked: ClipDescription | None = None) -> None:
        row = self.rows.setdefault(name, Row())
        embeddings, landmarks = self._embed(frames)
        row.frames += len(frames)
        row.found += int((~np.isnan(landmarks[:, 0, 0])).sum())
        for judge, vectors in embeddings.items():
            of_people = row.cosines.setdefault(judge, [[] for _ in self.people])
            if vectors:
                cosines = _unit(_unit(np.stack(vectors)) - self.centre[judge]) @ self.known[judge].T  # (F, people)
                of_people[person] += cosines[:, person].tolist()
                row.ranked.setdefault(judge, []).extend((cosines.argmax(1) == person).tolist())
                if name == "real, another clip":
                    others = self.rows.setdefault("real, other people", Row())
                    wrong = others.cosines.setdefault(judge, [[] for _ in self.people])
                    wrong[person] += np.delete(cosines, person, axis=1).ravel().tolist()
        row.motion.append(largest_found(motion_between(landmarks[:, :5])) / len(frames[0]))
        if asked is not None:
            for what, done in followed(asked, landmarks):
                row.followed.setdefault(what, []).append(done)

    def report(self) -> dict[str, dict[str, object]]:
        return {name: _summary(row) for name, row in self.rows.items()}


def followed(asked: ClipDescription, landmarks: np.ndarray) -> Iterator[tuple[str, bool]]:
    """Whether the face did what the caption says, for each thing that landmarks, (F, 5 + 68, 2), can tell."""
    seen = landmarks[~np.isnan(landmarks[:, 0, 0])]
    if len(seen) < 2:
        seen = np.full((2, *landmarks.shape[1:]), np.nan)
    ends = seen[:ENDS].mean(axis=0), seen[-ENDS:].mean(axis=0)
    first, last = (np.array(pose_of(points)) for points in ends)
    yaw, raised, roll, _ = last - first
    for what, direction, positive, change, least in (
        ("turn", turn(asked), "right", yaw, MOVED),
        ("nod", nod(asked), "up", raised, NODDED),
        ("tilt", tilt(asked), "right", roll, MOVED),
    ):
        if direction:
            yield what, bool(change > least if direction == positive else change < -least)
    if smiles(asked) and not turn(asked):  # a turned mouth looks narrower
        yield "smile", bool(last[3] > WIDER * first[3])


def pose_of(points: np.ndarray) -> tuple[float, float, float, float]:
    """Yaw in degrees, how far up the nose is, roll in degrees, and the mouth's width, of (5 + 68, 2) landmarks.

    Pitch would be the natural second, but five landmarks tell it badly at 64 px. The tip of a nose moves up between
    chin, 0, and bridge, 1, when the head does.
    """
    five, outline = points[:5], points[5:]
    if np.isnan(points).any():
        return (np.nan,) * 4
    yaw, _, roll = estimate_pose(five)
    face = outline[BRIDGE] - outline[CHIN]
    raised = (outline[NOSE] - outline[CHIN]) @ face / (face @ face)
    return yaw, float(raised), roll, float(np.linalg.norm(five[4] - five[3]) / np.linalg.norm(five[1] - five[0]))


@torch.no_grad()
def round_trip(mirror: MagicMirror, frames: np.ndarray) -> np.ndarray:
    vae = mirror.pipeline.vae
    pixels = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].to(vae.dtype) / 127.5 - 1
    decoded = vae.decode(vae.encode(pixels).latent_dist.mean).sample[0].clamp(-1, 1)
    return ((decoded.permute(1, 2, 3, 0).float() + 1) * 127.5).round().byte().numpy()


def tables(report: dict[str, dict[str, object]]) -> str:
    judges = list(next(iter(report.values()))["cosine"])
    lines = ["| | face found | " + " | ".join(f"{j}: cosine (sd over people), rank-1" for j in judges) + " |"]
    lines.append("|---|---|" + "---|" * len(judges))
    for name, row in report.items():
        cells = [
            f"{row['cosine'][j]['mean']:.3f} ({row['cosine'][j]['sd']:.3f}), {row['rank_1'].get(j, float('nan')):.1%}"
            for j in judges
        ]
        lines.append(f"| {name} | {row['face_rate']:.1%} | " + " | ".join(cells) + " |")
    lines += ["", f"| | FM_inter | {' | '.join(ASKED)} |", "|---|" + "---|" * (len(ASKED) + 1)]
    for name, row in report.items():
        if row["followed"]:
            cells = [f"{row['followed'].get(what, float('nan')):.0%}" for what in ASKED]
            lines.append(f"| {name} | {row['fm_inter']:.4f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _summary(row: Row) -> dict[str, object]:
    people = {judge: [np.mean(c) for c in of_people if c] for judge, of_people in row.cosines.items()}
    everything = [done for list_ in row.followed.values() for done in list_]
    return {
        "face_rate": row.found / row.frames if row.frames else float("nan"),
        "cosine": {judge: {"mean": float(np.mean(c)), "sd": float(np.std(c))} for judge, c in people.items()},
        "rank_1": {judge: float(np.mean(ranked)) for judge, ranked in row.ranked.items()},
        "fm_inter": mean_found(np.array(row.motion)) if row.motion else float("nan"),
        "followed": {what: float(np.mean(done)) for what, done in row.followed.items()}
        | ({"all": float(np.mean(everything))} if everything else {}),
    }


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="folder of a base model (default: tiny)")
    parser.add_argument("--adapter", type=Path, help="default: tiny's")
    parser.add_argument("--id-encoder", type=Path, help="default: tiny's")
    parser.add_argument("--people", type=int, default=50)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--out", type=Path, default=Path("scores.json"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
