"""report.html: one page without outside files; likeness over time of each clip, and its worst frames as pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ..picture_file import read_image
from ..video_reader import read_frames
from .plot import similarity_plot
from .run import ClipResult, Evaluation
from .scores import MEANS, Summary

WORST_FRAMES = 3
PICTURE_HEIGHT = 144  # pixels
BOX_COLOUR = (255, 60, 60)

_HEADINGS = {
    "id_similarity": "ID similarity",
    "id_decay": "ID decay",
    "fm_ref": "FM_ref",
    "fm_ref_pose": "FM_ref, pose",
    "fm_inter": "FM_inter",
    "fm_inter_px": "FM_inter, px",
    "smoothness": "smoothness",
    "motion_px": "motion, px",
    "text_alignment": "text alignment",
    "id_similarity_dlib": "ID similarity, dlib",
    "id_similarity_sface": "ID similarity, SFace",
    "facesim_arc": "FaceSim-Arc",
    "facesim_cur": "FaceSim-Cur",
    "motion_amplitude": "motion amplitude, px",
    "success_yaw_20": "accepted, yaw 0 to 20°",
    "success_yaw_45": "accepted, yaw 20 to 45°",
    "success_yaw_beyond": "accepted, yaw beyond",
}
STYLE = Path(__file__).with_name("page.css")


def render_page(evaluation: Evaluation, settings: Mapping[str, Any]) -> str:
    """The HTML of the whole page. settings: shown as they are; "threshold" is drawn into the plots."""
    threshold = float(settings["threshold"])
    style = STYLE.read_text(encoding="utf-8")
    parts = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Evaluation</title><style>{style}</style>',
        "<h1>Evaluation</h1>",
        f"<p>{escape(', '.join(f'{name}: {value}' for name, value in settings.items()))}</p>",
    ]
    if evaluation.clips:
        parts.append(_summary(evaluation.summary))
        if not np.isnan(evaluation.inception_score):
            parts.append(f"<p>Inception Score: {_number(evaluation.inception_score)}</p>")
        parts.append(_clip_table(evaluation.clips))
    if evaluation.skipped:
        items = "".join(
            f"<li>{escape(left_out.video)}: {escape(left_out.reason)}</li>" for left_out in evaluation.skipped
        )
        parts.append(f'<h2 class="bad">{len(evaluation.skipped)} not measured</h2><ul>{items}</ul>')
    parts += [_clip_section(number, clip, threshold) for number, clip in enumerate(evaluation.clips)]
    return "\n".join(parts) + "\n</html>\n"


def worst_frames(clip: ClipResult) -> list[int]:
    """Indices of the frames least like the person, worst first; frames without a face are not among them."""
    order = np.argsort(clip.similarity, kind="stable")  # NaN sorts last
    return [int(index) for index in order[:WORST_FRAMES] if not np.isnan(clip.similarity[index])]


def _summary(summary: Summary) -> str:
    rows = [
        ("frames with a face", "face_rate", summary.face_rate, f"{summary.frames} frames"),
        ("success: face found", "success_face", summary.success_face, f"{summary.clips} clips"),
        ("success: identity accepted", "success_identity", summary.success_identity, f"{summary.clips} clips"),
        ("dynamic degree (success: motion)", "success_motion", summary.success_motion, f"{summary.clips} clips"),
    ]
    rows += [(_HEADINGS[name], name, summary.means[name], f"{summary.measured[name]} clips") for name in MEANS]
    body = ""
    for heading, name, value, over in rows:
        interval = " to ".join(_number(end) for end in summary.intervals[name])
        body += f"<tr><td>{heading}</td><td>{_number(value)}</td><td>{interval}</td><td>{over}</td></tr>"
    return f"<h2>All clips</h2><table><tr><th></th><th>mean</th><th>95% interval</th><th>over</th></tr>{body}</table>"


def _clip_table(clips: list[ClipResult]) -> str:
    head = "".join(f"<th>{name}</th>" for name in ["video", "identity", "faces", *_HEADINGS.values(), "dynamic"])
    rows = []
    for number, clip in enumerate(clips):
        cells = [
            f'<a href="#clip-{number}">{escape(clip.name)}</a>',
            escape(clip.person.name),
            f"{clip.scores.faces} of {clip.scores.frames}",
            *(_number(vars(clip.scores)[name]) for name in MEANS),
            "yes" if clip.scores.dynamic else "no",
        ]
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return f'<h2>Clips</h2><div class="wide"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def _clip_section(number: int, clip: ClipResult, threshold: float) -> str:
    scores = clip.scores
    verdict = "accepted" if scores.identity_accepted else '<span class="bad">not accepted</span>'
    reference = thumbnail(read_image(clip.person.photos[0]))
    figures = [figure(reference, f"{clip.person.name}, first of {len(clip.person.photos)}")]
    worst = worst_frames(clip)
    pictures = _pictures(clip, worst)
    figures += [figure(pictures[index], f"frame {index}: {clip.similarity[index]:.3f}") for index in worst]
    return (
        f'<section id="clip-{number}"><h2>{escape(clip.name)}</h2>'
        f"<p>{escape(clip.person.name)}: {verdict}; {scores.faces} of {scores.frames} frames with a face; "
        f"ID similarity {_number(scores.id_similarity)}, decay {_number(scores.id_decay)}</p>"
        f"{similarity_plot(clip.similarity, threshold)}{''.join(figures)}</section>"
    )


def _pictures(clip: ClipResult, indices: list[int]) -> dict[int, str]:
    """Data URLs of these frames, with the face's box drawn in, by index."""
    pictures: dict[int, str] = {}
    for index, frame in enumerate(read_frames(clip.path) if indices else ()):
        if index in indices:
            pictures[index] = thumbnail(frame, clip.analysis.boxes[index])
        if len(pictures) == len(indices):
            break
    return pictures


def thumbnail(image: np.ndarray, box: np.ndarray | None = None) -> str:
    """A data URL of a picture, (H, W, 3) uint8 RGB, made smaller, with the box of the face, (4,) in its pixels."""
    scale = PICTURE_HEIGHT / image.shape[0]
    picture = Image.fromarray(image).resize((max(1, round(image.shape[1] * scale)), PICTURE_HEIGHT))
    if box is not None:
        ImageDraw.Draw(picture).rectangle([float(value) for value in box * scale], outline=BOX_COLOUR)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def figure(url: str, caption: str) -> str:
    return f'<figure><img src="{url}" alt=""><figcaption>{escape(caption)}</figcaption></figure>'


def _number(value: float) -> str:
    return "–" if np.isnan(value) else f"{round(value, 3) + 0.0:.3f}"  # + 0.0: no "-0.000"
