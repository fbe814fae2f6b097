"""Real detection and recognition on clips made of photographs and of rendered people."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from mm_core.errors import MagicMirrorError
from mm_core.evaluation.clip import ClipAnalysis, analyse_clip
from mm_core.evaluation.scores import ClipScores, frame_similarities, score_clip, summarise
from mm_core.faces.tracking import find_faces, follow
from mm_core.video import write_video
from mm_core.video_reader import read_frames

THRESHOLD = 0.25
FLAT = np.full((320, 250, 3), 120, np.uint8)


def scored(analyzer, person, frames) -> tuple[ClipAnalysis, np.ndarray, ClipScores]:
    clip = analyse_clip(analyzer, frames)
    similarity = frame_similarities(clip, person)
    return clip, similarity, score_clip(clip, person, similarity, THRESHOLD)


def blurred(image: np.ndarray, radius: float) -> np.ndarray:
    return np.array(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)))


def on_canvas(photo: np.ndarray, x: int, y: int) -> np.ndarray:
    canvas = np.full((420, 420, 3), 128, np.uint8)
    canvas[y : y + photo.shape[0], x : x + photo.shape[1]] = photo
    return canvas


def test_the_same_person_is_high_and_others_low(analyzer, photos, person_a):
    for name, photo in photos.items():
        _, similarity, scores = scored(analyzer, person_a, [photo])
        if name.startswith("person_a"):
            assert similarity[0] > 0.8  # the mean is of these two photos
        else:
            assert similarity[0] < 0.2
        assert scores.identity_accepted == name.startswith("person_a")


def test_the_mean_of_two_references_is_nearer_to_each_than_they_are_to_each_other(analyzer, photos, person_a):
    clip = analyse_clip(analyzer, [photos["person_a_1"]])
    alone = replace(person_a, embeddings=person_a.embeddings[1:])
    assert frame_similarities(clip, person_a)[0] > frame_similarities(clip, alone)[0] > 0.5


def test_a_still_clip_neither_moves_nor_decays(analyzer, photos, person_a):
    _, similarity, scores = scored(analyzer, person_a, [photos["person_a_2"]] * 5)
    assert np.ptp(similarity) == 0
    assert scores.id_decay == scores.fm_inter == scores.fm_inter_px == scores.motion_px == 0
    assert scores.smoothness == 1
    assert (scores.frames, scores.faces, scores.dynamic) == (5, 5, False)
    assert scores.fm_ref < 0.4  # another photo's pose, in another aspect ratio


def test_the_reference_itself_has_no_fm_ref(analyzer, photographs, person_a):
    from mm_core.picture_file import read_image

    _, _, scores = scored(analyzer, person_a, [read_image(photographs / "person_a_1.jpg")])
    assert (scores.fm_ref, scores.fm_ref_pose) == pytest.approx((0, 0), abs=0.02)


def test_a_shifted_face_gives_the_shift(analyzer, photos, person_a):
    frames = [on_canvas(photos["person_a_2"], 20 + 9 * index, 10 + 12 * index) for index in range(5)]
    clip, _, scores = scored(analyzer, person_a, frames)
    assert np.diff(clip.landmarks.mean(axis=1), axis=0) == pytest.approx(np.tile([9, 12], (4, 1)), abs=1)
    assert scores.fm_inter_px == pytest.approx(15, abs=1)
    assert scores.fm_inter == pytest.approx(15 / 420, abs=1 / 420)
    assert scores.fm_ref_pose < scores.fm_ref  # the canvas is square, the reference upright
    assert scores.dynamic
    assert scores.smoothness > 0.7


def test_a_face_swapped_half_way_drops(analyzer, photos, person_a):
    frames = [photos["person_a_2"]] * 4 + [photos["person_b_1"]] * 4
    _, similarity, scores = scored(analyzer, person_a, frames)
    assert similarity[:4].min() > 0.8
    assert similarity[4:].max() < 0.2
    assert scores.id_decay > 0.7
    assert scores.id_similarity == pytest.approx(similarity.mean())


def test_a_fading_identity_decays(analyzer, photos, person_a):
    into_another = [
        np.round((1 - part) * photos["person_a_2"] + part * photos["impostor_1"]).astype(np.uint8)
        for part in np.linspace(0, 1, 4)
    ]
    into_blur = [blurred(photos["person_a_2"], radius) for radius in (0, 2, 4, 7)]
    assert scored(analyzer, person_a, into_another)[2].id_decay > 0.5
    assert scored(analyzer, person_a, into_blur)[2].id_decay > 0.1


def test_a_clip_without_faces_has_no_numbers_of_faces(analyzer, person_a):
    clip, similarity, scores = scored(analyzer, person_a, [FLAT] * 3)
    assert np.isnan(similarity).all()
    assert clip.embeddings.shape == (3, 0)
    assert (scores.faces, scores.face_rate, scores.face_found, scores.identity_accepted) == (0, 0, False, False)
    assert np.isnan([scores.id_similarity, scores.id_decay, scores.fm_ref, scores.fm_inter]).all()
    assert scores.smoothness == 1


def test_lost_frames_are_counted_not_averaged(analyzer, photos, person_a):
    _, similarity, scores = scored(analyzer, person_a, [photos["person_a_2"], FLAT, photos["person_a_2"]])
    assert (scores.faces, scores.frames) == (2, 3)
    assert scores.id_similarity == pytest.approx(similarity[0])
    assert np.isnan(scores.fm_inter)  # no two consecutive faces


def test_the_summary_says_over_how_many_clips(analyzer, photos, person_a):
    good = scored(analyzer, person_a, [photos["person_a_2"]] * 2)[2]
    other = scored(analyzer, person_a, [photos["person_b_1"]] * 2)[2]
    empty = scored(analyzer, person_a, [FLAT] * 4)[2]
    summary = summarise([good, other, empty], ["a", "b", "c"])
    assert (summary.clips, summary.frames, summary.face_rate) == (3, 8, 0.5)
    assert summary.measured["id_similarity"] == 2
    assert summary.means["id_similarity"] == pytest.approx((good.id_similarity + other.id_similarity) / 2)
    assert (summary.success_face, summary.success_identity) == pytest.approx((2 / 3, 1 / 3))
    assert summary.success_motion == 0


def test_the_person_is_followed_not_the_largest_face(analyzer, photos):
    small = np.array(Image.fromarray(photos["person_b_1"]).resize((156, 200)))

    def frame(with_other: bool) -> np.ndarray:
        canvas = np.full((340, 460, 3), 128, np.uint8)
        canvas[70:270, 10:166] = small
        if with_other:
            canvas[10:330, 200:450] = photos["person_a_2"][:, :250]
        return canvas

    alone_first = analyse_clip(analyzer, [frame(False), frame(True), frame(True)])
    assert (alone_first.landmarks[..., 0] < 180).all()
    both_first = analyse_clip(analyzer, [frame(True), frame(True), frame(False)])
    assert (both_first.landmarks[:2, :, 0] > 180).all()
    assert (both_first.landmarks[2, :, 0] < 180).all()  # nobody else is left


def test_follow_takes_the_largest_after_a_cut(analyzer, photos):
    face = find_faces(analyzer, photos["person_a_2"])[0]
    near = replace(face, box=face.box + 10, size=50.0)
    far = replace(face, box=face.box + 1000)
    farther = replace(face, box=face.box + 2000, size=face.size + 1)
    assert follow([near, far], face) is near
    assert follow([far, farther], face) is farther
    assert follow([], face) is None


def test_small_frames_are_enlarged_for_the_detector(analyzer):
    pytest.importorskip("numba")
    from lab.people.person import Person as Rendered
    from lab.people.render import render_clip
    from lab.people.scene import sample_clip

    frames = render_clip(Rendered.from_seed(1_000_000), sample_clip(1_000_000, 0, size=64))
    clip = analyse_clip(analyzer, frames)
    assert clip.found.all()
    assert clip.size == (64, 64)
    assert ((clip.landmarks > 8) & (clip.landmarks < 56)).all()


def test_a_file_is_read_back(tmp_path, photos):
    path = write_video(tmp_path / "clip.mp4", np.stack([photos["person_a_2"]] * 3), 8)
    frames = list(read_frames(path))
    assert len(frames) == 3
    assert np.abs(frames[0].astype(int) - photos["person_a_2"]).mean() < 4


def test_what_is_no_video_says_so(tmp_path, analyzer):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"nothing" * 100)
    for path in (broken, tmp_path / "missing.mp4"):
        with pytest.raises(MagicMirrorError, match=path.name):
            list(read_frames(path))
    with pytest.raises(MagicMirrorError, match="no frame"):
        analyse_clip(analyzer, [])
    with pytest.raises(MagicMirrorError, match="64 x 32 and 32 x 64 px"):
        analyse_clip(analyzer, [np.zeros((32, 64, 3), np.uint8), np.zeros((64, 32, 3), np.uint8)])
