"""Crops and picture files: exact geometry on synthetic pictures, no models."""

import numpy as np
import pytest
from PIL import Image

from mm_core import picture_file
from mm_core.errors import MagicMirrorError, SettingError
from mm_core.faces.crop import square_crop, whole_image
from mm_core.faces.references import parse_weights
from mm_core.picture_file import read_image

NOISE = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)


def test_square_is_twice_the_larger_side_around_the_centre():
    box = np.float32([150, 94, 206, 206])  # 56 x 112, centre (178, 150): the square is x 66..290, y 38..262
    np.testing.assert_array_equal(square_crop(NOISE, box), NOISE[38:262, 66:290])
    np.testing.assert_array_equal(square_crop(NOISE, box, scale=1.0, size=112), NOISE[94:206, 122:234])


def test_box_fills_the_middle_half_after_resizing():
    image = np.zeros((1000, 1000, 3), np.uint8)
    image[300:748, 200:648] = 255
    crop = square_crop(image, np.float32([200, 300, 648, 748]))
    assert (crop[58:166, 58:166] == 255).all()
    assert not crop[:54].any() and not crop[170:].any() and not crop[:, :54].any() and not crop[:, 170:].any()


def test_square_follows_fractions_of_a_pixel():
    ramp = np.broadcast_to(np.arange(0, 256, 8, np.uint8)[None, :, None], (32, 32, 3))
    whole, moved = (square_crop(ramp, np.array([x, 12, x + 8, 20]), size=16).astype(int) for x in (12.0, 12.5))
    assert (whole[0, :, 0] == np.arange(64, 192, 8)).all()
    assert (moved[:, 2:-2] - whole[:, 2:-2] == 4).all()  # half of a step of 8


def test_outside_the_picture_the_edges_go_on_without_streaks():
    crop = square_crop(NOISE, np.float32([-56, -56, 56, 56])).astype(int)  # the square is -112..112 both ways
    np.testing.assert_array_equal(crop[112:, 112:], NOISE[:112, :112])  # what is in the picture stays as it is
    rough = np.abs(np.diff(NOISE[:112, :112].astype(int), axis=0)).mean()
    assert np.abs(np.diff(crop[112:, :112], axis=0)).mean() < 0.05 * rough  # repeated pixels would be as rough
    far = square_crop(NOISE, np.float32([344, 244, 456, 356]))  # beyond the lower right corner
    np.testing.assert_array_equal(far[:112, :112], NOISE[188:, 288:])
    plain = np.full((300, 400, 3), (200, 150, 100), np.uint8)
    assert (square_crop(plain, np.float32([-56, -56, 56, 56])) == (200, 150, 100)).all()


def test_a_very_large_face_is_cropped_like_a_smaller_one():
    large = NOISE[:200, :200].repeat(30, axis=0).repeat(30, axis=1)  # 6000 px
    small, large = (
        square_crop(NOISE[:200, :200], np.float32([30, 30, 180, 180])),
        square_crop(large, np.float32([900, 900, 5400, 5400])),
    )
    assert np.abs(small.astype(int) - large).mean() < 12


def test_shrinking_is_antialiased():
    board = np.indices((896, 896)).sum(axis=0) % 2 * 255
    board = np.repeat(board[..., None], 3, axis=2).astype(np.uint8)
    for crop in (square_crop(board, np.float32([224, 224, 672, 672])), whole_image(board)):
        assert np.abs(crop.astype(int) - 127).max() <= 3


@pytest.mark.parametrize("upright", [False, True])
def test_whole_image_is_the_centre(upright):
    image = np.zeros((448, 1000, 3), np.uint8)
    image[:, 276:724] = NOISE[0, 0]
    crop = whole_image(image.transpose(1, 0, 2) if upright else image)
    crop = crop.transpose(1, 0, 2) if upright else crop
    assert crop.shape == (224, 224, 3)
    assert (crop[:, 3:-3] == NOISE[0, 0]).all()
    wider = whole_image(image[:, 276:724], size=112)
    assert wider.shape == (112, 112, 3) and (wider == NOISE[0, 0]).all()


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned left; to be shown turned right
    Image.fromarray(NOISE).transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "turned.png"), NOISE)


def test_modes_other_than_rgb(tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(NOISE[..., 0].astype(np.uint16) * 257).save(path)
    np.testing.assert_array_equal(read_image(path), np.repeat(NOISE[..., :1], 3, axis=2))
    Image.fromarray(NOISE[..., 0]).save(path)
    np.testing.assert_array_equal(read_image(path), np.repeat(NOISE[..., :1], 3, axis=2))

    alpha = np.zeros((300, 400, 1), np.uint8)
    alpha[:, 200:] = 255
    Image.fromarray(np.concatenate([NOISE, alpha], axis=2)).save(path)
    flat = read_image(path)
    assert (flat[:, :200] == 128).all()
    np.testing.assert_array_equal(flat[:, 200:], NOISE[:, 200:])

    Image.fromarray(np.array([[0, 257, 65535, 70000]], np.int32)).save(tmp_path / "deep.tif")
    np.testing.assert_array_equal(read_image(tmp_path / "deep.tif")[0, :, 0], [0, 1, 255, 255])

    Image.new("CMYK", (8, 8), (255, 0, 0, 0)).save(tmp_path / "ink.tif")
    np.testing.assert_array_equal(read_image(tmp_path / "ink.tif")[0, 0], [0, 255, 255])


def test_unreadable_files_are_named(tmp_path):
    photo = tmp_path / "photo.png"
    Image.fromarray(NOISE).save(photo)
    (tmp_path / "cut.png").write_bytes(photo.read_bytes()[:5000])
    (tmp_path / "text.jpg").write_text("not a picture")
    for name in ("missing.jpg", "text.jpg", "cut.png"):
        with pytest.raises(MagicMirrorError, match=f"{name}.*Use a JPEG"):
            read_image(tmp_path / name)
    with pytest.raises(MagicMirrorError, match="Cannot read the photo"):
        read_image(tmp_path)


def test_photos_too_large_and_other_formats_are_refused(tmp_path, monkeypatch):
    """Before they are read; Pillow would start Ghostscript for what is no photo."""
    for width, message in ((11_000, "is 11000 x 10000 px, more than the 100 mega"), (20_000, "more than the 100 mega")):
        Image.new("1", (width, 10_000)).save(tmp_path / "large.png")
        with pytest.raises(MagicMirrorError, match=rf"large.png .*{message}"):
            read_image(tmp_path / "large.png")
    Image.fromarray(NOISE).save(tmp_path / "drawing.eps")
    (tmp_path / "drawing.eps").rename(tmp_path / "drawing.png")
    with pytest.raises(MagicMirrorError, match=r"drawing.png.*Use a JPEG"):
        read_image(tmp_path / "drawing.png")
    monkeypatch.setattr(picture_file, "PICTURE_BYTES", 1000)
    with pytest.raises(MagicMirrorError, match=r"large.png has \d+ bytes, more than 1000"):
        read_image(tmp_path / "large.png")


def test_weights_are_read_from_text():
    assert parse_weights("") is parse_weights("  ") is None
    assert parse_weights("1, 0.5") == parse_weights(" 1,.5 ", 2) == [1.0, 0.5]
    for text in ("1, half", "1,", "1 0.5", ";"):
        with pytest.raises(SettingError, match="one number a photo"):
            parse_weights(text)
    for text, message in (("-1", "photo 1 is -1"), ("0, 0", "all weights are 0"), ("1, inf", "photo 2 is inf")):
        with pytest.raises(SettingError, match=message):
            parse_weights(text)
    with pytest.raises(SettingError, match="2 weights for 3 photos"):
        parse_weights("1, 0.5", 3)
