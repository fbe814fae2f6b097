"""How near a frame that is decoded from a few latent frames is to the same one of the whole clip's decoding.

`python -m lab.tiny.judged_frame`: the inner frames of rendered clips through the VAE of `tiny`, by ArcFace w600k_mbf.
Prints a Markdown table.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mm_core.faces.analysis import FaceAnalyzer
from mm_core.faces.arcface import DifferentiableArcFace, align_faces
from mm_core.faces.tracking import find_faces, follow
from mm_core.pipelines.base import TinyBase
from mm_core.pipelines.presets import TEMPORAL_COMPRESSION
from mm_core.training.sample_losses import decode_frame
from scripts import environment

from ..people.person import Person
from ..people.render import render_clip
from ..people.scene import sample_clip
from ..people.traits import HELD_OUT
from .clips import to_unit

PACK, RECOGNISER = "buffalo_sc", "w600k_mbf.onnx"
CASES = ((0, torch.float32), (1, torch.float32), (2, torch.float32), (2, torch.bfloat16))
"""Latent frames before it, and the precision of the VAE."""


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lab.tiny.judged_frame", description=__doc__)
    parser.add_argument("--people", type=int, default=12)
    parser.add_argument("--frames", type=int, default=9)
    args = parser.parse_args()
    root = environment.face_models()
    analyzer = FaceAnalyzer(root, PACK, device="cpu")
    recogniser = DifferentiableArcFace(root / "models" / PACK / RECOGNISER)
    vae = TinyBase().load_vae(torch.float32)
    rounded = TinyBase().load_vae(torch.bfloat16)
    found: dict[tuple[int, torch.dtype], list[tuple[float, float]]] = {case: [] for case in CASES}
    for seed in range(HELD_OUT + 300, HELD_OUT + 300 + args.people):
        clip = render_clip(Person.from_seed(seed), sample_clip(seed, 1, frames=args.frames))
        latents = vae.encode(to_unit(clip[None]).permute(0, 4, 1, 2, 3)).latent_dist.mode()  # (1, C, F', H', W')
        whole = vae.decode(latents).sample / 2 + 0.5
        latents = latents.transpose(1, 2) * vae.config.scaling_factor
        for frame in range(1, latents.shape[1]):
            place = TEMPORAL_COMPRESSION * frame
            face = follow(find_faces(analyzer, clip[place], recognise=False), None)
            if face is None:
                continue
            landmarks, wanted = torch.from_numpy(face.landmarks)[None], whole[:, :, place]

            def embed(picture: Tensor, landmarks: Tensor = landmarks) -> Tensor:
                return recogniser(align_faces(picture.clamp(0, 1), landmarks))

            for behind, dtype in CASES:
                by = vae if dtype == torch.float32 else rounded
                picture = decode_frame(by, latents[:, max(0, frame - behind) : frame + 1])
                cosine = F.cosine_similarity(embed(picture), embed(wanted))
                found[behind, dtype].append((float(cosine), 2 * float((picture - wanted).square().mean().sqrt())))
    print("| latent frames before it | frames | cosine | root mean square, of -1 to 1 |", "|---|---|---|---|", sep="\n")
    for (behind, dtype), values in found.items():
        cosine, error = np.mean(values, axis=0)
        print(f"| {behind}, {str(dtype).removeprefix('torch.')} | {len(values)} | {cosine:.3f} | {error:.3f} |")


if __name__ == "__main__":
    main()
