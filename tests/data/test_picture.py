"""Every odd file that a user may hand in, written here and read back."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageDraw

from v3d_jax import errors
from v3d_jax.data import picture

RED, BLUE = (200, 40, 30), (30, 60, 200)


def drawing(size=(64, 48), mode="RGB"):
    """Red in the left half, blue in the right one."""
    image = Image.new("RGB", size, RED)
    ImageDraw.Draw(image).rectangle((size[0] // 2, 0, size[0], size[1]), fill=BLUE)
    return image.convert(mode)


def with_alpha(size=(64, 48)):
    image = drawing(size).convert("RGBA")
    alpha = Image.new("L", size, 0)
    ImageDraw.Draw(alpha).ellipse((8, 8, size[0] - 8, size[1] - 8), fill=255)
    image.putalpha(alpha)
    return image


def refused(path, match):
    with pytest.raises(errors.UserError, match=match) as caught:
        picture.read(path)
    message = str(caught.value)
    assert "\n" not in message
    assert path.name in message
    return message


def assert_halves(read, tolerance=12):
    np.testing.assert_allclose(
        read.rgb[:, 4], np.broadcast_to(RED, read.rgb[:, 4].shape), atol=tolerance
    )
    np.testing.assert_allclose(
        read.rgb[:, -4], np.broadcast_to(BLUE, read.rgb[:, -4].shape), atol=tolerance
    )


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tiff", "gif"])
def test_common_formats(tmp_path, suffix):
    path = tmp_path / f"picture.{suffix}"
    drawing().save(path)
    read = picture.read(path)
    assert read.rgb.shape == (48, 64, 3)
    assert read.alpha is None
    assert read.notes == ()
    assert_halves(read)


def test_missing_file_and_folder(tmp_path):
    refused(tmp_path / "absent.png", "does not exist")
    refused(tmp_path, "is a folder")


def test_empty_file_and_what_is_no_picture(tmp_path):
    (tmp_path / "zero.png").write_bytes(b"")
    refused(tmp_path / "zero.png", "is empty")
    (tmp_path / "text.png").write_text("no picture at all")
    refused(tmp_path / "text.png", "not a picture")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tiff"])
def test_truncated_file(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, {"jpg": "jpeg"}.get(suffix, suffix))
    path = tmp_path / f"cut.{suffix}"
    path.write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    refused(path, "damaged|not a picture")


def test_damaged_png_chunk(tmp_path):
    buffer = io.BytesIO()
    drawing().save(buffer, "png")
    data = bytearray(buffer.getvalue())
    data[data.index(b"IDAT") + 8] ^= 0xFF
    path = tmp_path / "flipped.png"
    path.write_bytes(data)
    refused(path, "damaged")


@pytest.mark.parametrize("size", [(1, 1), (7, 500), (500, 1)])
def test_too_small(tmp_path, size):
    path = tmp_path / "small.png"
    Image.new("RGB", size).save(path)
    refused(path, f"{size[0]} x {size[1]}")


def test_transparent_everywhere(tmp_path):
    path = tmp_path / "nothing.png"
    Image.new("RGBA", (32, 32), (255, 0, 0, 0)).save(path)
    refused(path, "transparent everywhere")


def test_own_alpha_is_kept(tmp_path):
    path = tmp_path / "cut.png"
    with_alpha().save(path)
    read = picture.read(path)
    np.testing.assert_array_equal(read.alpha, np.asarray(with_alpha())[..., 3])


def test_opaque_alpha_channel_counts_as_none(tmp_path):
    path = tmp_path / "opaque.png"
    drawing(mode="RGBA").save(path)
    assert picture.read(path).alpha is None


def test_grey_with_alpha(tmp_path):
    path = tmp_path / "grey.png"
    with_alpha().convert("LA").save(path)
    read = picture.read(path)
    np.testing.assert_array_equal(read.alpha, np.asarray(with_alpha())[..., 3])
    np.testing.assert_array_equal(read.rgb[..., 0], read.rgb[..., 2])


def test_palette_with_and_without_transparency(tmp_path):
    path = tmp_path / "palette.png"
    drawing().quantize(8).save(path)
    assert_halves(picture.read(path))
    indexed = Image.new("P", (64, 48), 0)
    indexed.putpalette([0, 0, 0, *RED, *BLUE])
    ImageDraw.Draw(indexed).rectangle((10, 10, 50, 40), fill=1)
    indexed.save(path, transparency=0)
    read = picture.read(path)
    assert set(np.unique(read.alpha)) == {0, 255}
    assert read.alpha[20, 20] == 255
    assert tuple(read.rgb[20, 20]) == RED


def test_transparent_colour_of_a_plain_png(tmp_path):
    path = tmp_path / "key.png"
    drawing().save(path, transparency=BLUE)
    read = picture.read(path)
    assert (read.alpha[:, :30] == 255).all()
    assert (read.alpha[:, 40:] == 0).all()


def test_cmyk(tmp_path):
    for suffix in ("jpg", "tiff"):
        path = tmp_path / f"print.{suffix}"
        drawing(mode="CMYK").save(path)
        assert_halves(picture.read(path))


def test_sixteen_bit_grey(tmp_path):
    path = tmp_path / "deep.png"
    values = np.linspace(0, 65535, 64 * 48).reshape(48, 64).astype(np.uint16)
    Image.fromarray(values).save(path)
    read = picture.read(path)
    np.testing.assert_allclose(read.rgb[..., 0], values / 257.0, atol=0.51)


def test_sixteen_bit_colour(tmp_path):
    """Pillow writes no such file, so it is put together here."""
    pixels = (np.asarray(drawing()).astype(">u2") * 257).reshape(48, -1)
    rows = b"".join(b"\x00" + row.tobytes() for row in pixels)
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", 64, 48, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    data = b"\x89PNG\r\n\x1a\n"
    for name, body in chunks:
        checksum = struct.pack(">I", zlib.crc32(name + body))
        data += struct.pack(">I", len(body)) + name + body + checksum
    path = tmp_path / "deep.png"
    path.write_bytes(data)
    assert_halves(picture.read(path), tolerance=1)


def test_float_and_32_bit_pixels_are_refused(tmp_path):
    path = tmp_path / "float.tiff"
    Image.fromarray(np.full((16, 16), 0.5, np.float32)).save(path)
    refused(path, "floating-point")
    path = tmp_path / "long.tiff"
    Image.fromarray(np.full((16, 16), 10**6, np.int32)).save(path)
    refused(path, "32-bit")


def test_bilevel(tmp_path):
    path = tmp_path / "fax.png"
    drawing(mode="1").save(path)
    assert picture.read(path).rgb.shape == (48, 64, 3)


@pytest.mark.parametrize(("orientation", "turn"), [(6, 3), (3, 2), (8, 1)])
def test_exif_rotation(tmp_path, orientation, turn):
    path = tmp_path / "phone.jpg"
    stored = Image.fromarray(np.rot90(np.asarray(drawing()), -turn).copy())
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(path, exif=exif, quality=95)
    read = picture.read(path)
    turned = {6: np.rot90(np.asarray(stored), -1), 3: np.rot90(np.asarray(stored), 2)}
    expected = turned.get(orientation, np.rot90(np.asarray(stored), 1))
    assert read.rgb.shape == expected.shape
    np.testing.assert_allclose(read.rgb[4, 4], expected[4, 4], atol=12)
    np.testing.assert_allclose(read.rgb[-4, -4], expected[-4, -4], atol=12)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_animation_gives_its_first_frame_and_says_so(tmp_path, suffix):
    path = tmp_path / f"moving.{suffix}"
    second = Image.new("RGB", (64, 48), (0, 255, 0))
    drawing().save(path, save_all=True, append_images=[second], duration=100)
    read = picture.read(path)
    assert_halves(read, tolerance=20)
    assert len(read.notes) == 1
    assert "several frames" in read.notes[0]


@pytest.mark.parametrize(
    "mode", ["RGB", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("P", "1", "I;16"))]
)
def test_a_hundred_megapixels_are_read_shrunk(tmp_path, mode):
    path = tmp_path / "poster.png"
    if mode == "I;16":
        Image.fromarray(np.full((8_000, 12_500), 5_000, np.uint16)).save(path, compress_level=1)
    else:
        drawing((12_500, 8_000), mode).save(path, compress_level=1)
    read = picture.read(path)
    assert read.rgb.shape == (1311, 2048, 3)
    if mode == "RGB":
        assert_halves(read, tolerance=1)


def test_a_huge_jpeg_is_decoded_at_a_fraction(tmp_path):
    path = tmp_path / "poster.jpg"
    drawing((8_192, 4_096)).save(path)
    read = picture.read(path)
    assert read.rgb.shape == (1024, 2048, 3)
    assert_halves(read)


@pytest.mark.parametrize(("width", "height"), [(20_000, 8_000), (60_000, 60_000)])
def test_beyond_the_limit_is_refused_from_the_header(tmp_path, width, height):
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header
    chunk += struct.pack(">I", zlib.crc32(b"IHDR" + header))
    path = tmp_path / "bomb.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + b"\x00\x00\x00\x00IDAT5\xaf\x06\x1e")
    message = refused(path, "megapixels")
    assert "128" in message


def test_an_opened_image_is_taken_too():
    assert_halves(picture.read(drawing()), tolerance=0)
