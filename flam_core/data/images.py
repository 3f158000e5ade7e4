"""Pictures (JPEG, PNG, WebP, BMP) as the frames of a video."""

from __future__ import annotations

import io

import numpy as np
from av.video.frame import VideoFrame
from PIL import Image, ImageOps, UnidentifiedImageError

from flam_core.data.videos import Unusable

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
_MODES_OF_8_BITS = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"})


def decode_image(content: bytes, name: str) -> VideoFrame:
    """A picture as an RGB frame, upright; transparency is dropped.

    Raises Unusable, with `name`, if it is damaged, of another format, or of more than 8 bits a channel.
    """
    try:
        with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
            if image.mode not in _MODES_OF_8_BITS:
                raise Unusable(f"image {name}: mode {image.mode}, not 8 bits a channel")
            pixels = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except UnidentifiedImageError as error:
        raise Unusable(f"image {name}: not a picture in {', '.join(_FORMATS)}") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise Unusable(f"image {name}: damaged: {error}") from error
    return VideoFrame.from_ndarray(np.ascontiguousarray(pixels), "rgb24")
