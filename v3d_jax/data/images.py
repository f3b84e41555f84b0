"""Texture images as uint8 RGBA arrays, and back to bytes."""

import io

import numpy as np


def read(data: bytes) -> np.ndarray:
    """Decodes an image file to uint8 [h, w, 4]; alpha is 255 where the file has none.

    Raises ValueError for what is no image, is damaged or is empty.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            pixels = np.asarray(image.convert("RGBA"))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"a texture cannot be decoded ({error})") from error
    if pixels.size == 0:
        raise ValueError("a texture is empty")
    return pixels


def square(pixels: np.ndarray, size: int) -> np.ndarray:
    """Resizes uint8 [h, w, 4] to `size` x `size` texels, whatever its aspect (uv are relative).

    Whole multiples repeat texels; otherwise a Lanczos filter that weights colours by alpha, so
    that hidden texels do not bleed into visible ones.
    """
    from PIL import Image

    height, width = pixels.shape[:2]
    if size % height == 0 and size % width == 0:
        return pixels.repeat(size // height, axis=0).repeat(size // width, axis=1)
    lanczos = Image.Resampling.LANCZOS
    if (pixels[..., 3] == 255).all():
        resized = Image.fromarray(pixels[..., :3]).resize((size, size), lanczos)
        return np.asarray(resized.convert("RGBA"))
    # Pillow premultiplies "RGBA" images by themselves while it filters them.
    return np.asarray(Image.fromarray(pixels).resize((size, size), lanczos))


def encode(pixels: np.ndarray, quality: int) -> bytes:
    """Encodes uint8 [h, w, 4] as WebP, lossy in colour, lossless in alpha."""
    from PIL import Image

    opaque = bool((pixels[..., 3] == 255).all())
    image = Image.fromarray(pixels[..., :3] if opaque else pixels)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=quality, method=4, alpha_quality=100)
    return buffer.getvalue()
