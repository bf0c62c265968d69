"""Any picture that a user may have becomes RGB bytes, or is refused with a reason."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastris.inference import images
from fastris.inference.images import read_image

WIDTH, HEIGHT = 12, 8


def picture() -> Image.Image:
    """Red on the left, green on the right, the top left corner blue: no symmetry that hides a turn."""
    rgb = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    rgb[:, :6, 0], rgb[:, 6:, 1] = 200, 120
    rgb[:3, :3] = (0, 0, 250)
    return Image.fromarray(rgb)


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "webp", "gif", "ppm", "tga"])
def test_formats_without_loss_give_the_same_pixels(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"picture.{suffix}"
    picture().save(path, **({"lossless": True} if suffix == "webp" else {}))
    np.testing.assert_array_equal(read_image(path), np.asarray(picture()))


@pytest.mark.parametrize("mode", ["RGB", "CMYK", "YCbCr", "P", "RGBA", "RGBX"])
def test_colour_modes_keep_their_colours(mode: str) -> None:
    rgb = read_image(picture().quantize(8) if mode == "P" else picture().convert(mode))
    assert (rgb.shape, rgb.dtype) == ((HEIGHT, WIDTH, 3), np.uint8)
    np.testing.assert_allclose(rgb.astype(int), np.asarray(picture()).astype(int), atol=3)


def test_jpeg_cmyk_is_not_inverted(tmp_path: Path) -> None:
    picture().convert("CMYK").resize((96, 64)).save(tmp_path / "print.jpg", quality=95)
    assert read_image(tmp_path / "print.jpg")[40, 30, 0] > 150


@pytest.mark.parametrize("mode", ["L", "1", "LA", "PA"])
def test_grey_and_bilevel_become_three_equal_or_known_channels(mode: str) -> None:
    rgb = read_image(picture().convert("L").convert(mode))
    assert rgb.shape == (HEIGHT, WIDTH, 3)
    assert (rgb[..., 0] == rgb[..., 1]).all() and (rgb[..., 0] == rgb[..., 2]).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_camera_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    turned = {
        1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]  # fmt: skip
    stored = picture() if turned is None else picture().transpose(turned)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "photo.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "photo.png"), np.asarray(picture()))


def test_transparent_parts_show_white(tmp_path: Path) -> None:
    rgba = picture().convert("RGBA")
    rgba.putalpha(Image.fromarray(np.where(np.arange(WIDTH) < 6, 0, 255).astype(np.uint8)[None].repeat(HEIGHT, 0)))
    palette = picture().convert("P")
    palette.save(tmp_path / "palette.png", transparency=palette.getpixel((0, 0)))
    assert (read_image(rgba)[:, :6] == 255).all()
    assert (read_image(rgba)[:, 6:, 1] == 120).all()
    assert (read_image(np.asarray(rgba)) == read_image(rgba)).all()
    shown = read_image(tmp_path / "palette.png")
    assert (shown[:3, :3] == 255).all() and shown[5, 10, 1] > 100 > shown[5, 10, 0]


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_sixteen_bit_grey_is_mapped_by_its_full_range(tmp_path: Path, kind: str) -> None:
    levels = np.linspace(0, 65535, WIDTH * HEIGHT).reshape(HEIGHT, WIDTH).astype(np.uint16)
    Image.fromarray(levels).save(tmp_path / f"deep.{kind}")
    rgb = read_image(tmp_path / f"deep.{kind}")
    np.testing.assert_array_equal(rgb[..., 1], np.rint(levels / 257).astype(np.uint8))


def test_dark_sixteen_bit_grey_is_pointed_out() -> None:
    with pytest.warns(UserWarning, match=r"brightest .* 4000 of 65535"):
        read_image(Image.fromarray(np.full((4, 4), 4000, np.uint16)))
    assert (read_image(Image.fromarray(np.full((4, 4), 200, np.uint16))) == 200).all()


def test_floating_point_and_integers_of_32_bits_are_mapped_where_their_range_is_plain() -> None:
    assert (read_image(Image.fromarray(np.full((4, 4), 0.4, np.float32))) == 102).all()
    assert (read_image(Image.fromarray(np.full((4, 4), 102.0, np.float32))) == 102).all()
    assert (read_image(Image.fromarray(np.full((4, 4), 65535, np.int32))) == 255).all()
    for value in (-1.0, 300.0, np.nan, np.inf):
        with pytest.raises(ValueError, match=r"image holds values .* scale them"):
            read_image(Image.fromarray(np.array([[value, 0.5]], np.float32)))
    with pytest.raises(ValueError, match="holds values from 0 to 70000"):
        read_image(Image.fromarray(np.array([[0, 70000]], np.int32)))


def test_animation_gives_its_first_frame_with_a_warning(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (5, 4), colour) for colour in ("red", "green", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    with pytest.warns(UserWarning, match=r"moving\.gif holds several pictures"):
        assert (read_image(tmp_path / "moving.gif") == (255, 0, 0)).all()


def test_arrays_are_taken_as_rgb_or_grey() -> None:
    rgb = np.asarray(picture())
    np.testing.assert_array_equal(read_image(rgb), rgb)
    np.testing.assert_array_equal(read_image(rgb[:, ::-1]), rgb[:, ::-1])
    for grey in (rgb[..., 0], rgb[..., :1]):
        np.testing.assert_array_equal(read_image(grey), rgb[..., :1].repeat(3, 2))


def test_the_result_never_shares_memory_with_the_users_array() -> None:
    rgb = np.array(picture())
    read_image(rgb)[:] = 7
    np.testing.assert_array_equal(rgb, np.asarray(picture()))


@pytest.mark.parametrize(
    ("array", "error", "message"),
    [
        (np.zeros((4, 4, 3), np.float32), TypeError, "must be uint8, got an array of float32"),
        (np.zeros((4, 4), bool), TypeError, "must be uint8"),
        (np.zeros((3, 40, 50), np.uint8), ValueError, r"\(3, 40, 50\); move the channels last"),
        (np.zeros((4,), np.uint8), ValueError, r"got \(4,\)"),
        (np.zeros((0, 4, 3), np.uint8), ValueError, "no pixels"),
        (np.zeros((1, 32767), np.uint8), ValueError, "no side may exceed 32766"),
        ([1, 2], TypeError, "must be a path, a PIL image or a uint8 array"),
    ],
)
def test_unusable_arrays_are_refused(array: np.ndarray, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        read_image(array)


def test_files_that_are_no_pictures_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "empty.jpg").write_bytes(b"")
    picture().resize((300, 300)).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:2000])
    picture().save(tmp_path / "whole.png")
    damaged = bytearray((tmp_path / "whole.png").read_bytes())
    damaged[45:60] = b"\0" * 15
    (tmp_path / "damaged.png").write_bytes(damaged)
    for name, reason in {
        "text.png": "is in none of the formats AVIF, BMP, .*JPEG, .*WEBP",
        "empty.jpg": "is an empty file",
        "cut.jpg": "cannot be decoded",
        "damaged.png": "cannot be decoded",
    }.items():
        with pytest.raises(ValueError, match=rf"{name} .*{reason}.*save the picture as PNG or JPEG"):
            read_image(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"missing\.png does not exist"):
        read_image(str(tmp_path / "missing.png"))
    with pytest.raises(FileNotFoundError, match="is a folder"):
        read_image(tmp_path)


def test_a_file_that_another_program_would_draw_is_refused_unopened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args: pytest.fail("Ghostscript was called"))
    picture().save(tmp_path / "drawing.eps")
    for name in ("drawing.eps", "renamed.jpg"):
        (tmp_path / name).write_bytes((tmp_path / "drawing.eps").read_bytes())
        with pytest.raises(ValueError, match=rf"{name} is in none of the formats .*JPEG.*; save the picture as PNG"):
            read_image(tmp_path / name)
    with pytest.raises(ValueError, match="image is EPS"):
        read_image(Image.open(tmp_path / "drawing.eps"))


def test_a_pipe_is_told_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(FileNotFoundError, match="is a pipe and no file; give the path of a picture"):
        read_image(tmp_path / "pipe.png")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "1", "I;16", "F"])
def test_strips_give_what_the_whole_picture_gives(mode: str, orientation: int, monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.fromarray(np.linspace(0, 65535, 96).reshape(HEIGHT, WIDTH).astype(np.uint16))
    if mode != "I;16":
        image = picture().convert("L").convert("F") if mode == "F" else picture().convert(mode)
    image.getexif()[0x0112] = orientation
    whole = read_image(image)
    monkeypatch.setattr(images, "STRIP_PIXELS", 3 * WIDTH)
    np.testing.assert_array_equal(read_image(image), whole)


def test_large_photos_pass_in_silence_and_decompression_bombs_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture().save(tmp_path / "large.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60)
        read_image(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    with pytest.raises(ValueError, match=r"large\.png has more than .* pixels; shrink or crop it first"):
        read_image(tmp_path / "large.png")


def test_a_side_too_long_for_the_warp_is_refused_before_decoding(tmp_path: Path) -> None:
    Image.new("1", (32767, 2)).save(tmp_path / "long.png")
    with pytest.raises(ValueError, match="32767 x 2 pixels; no side may exceed 32766: shrink or crop it first"):
        read_image(tmp_path / "long.png")
