"""Images to tensors, by the image processor that lies beside a model."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from twinmerge.errors import DataError, ModelError, ResourceError, UsageError
from twinmerge.store.foreign import check_settings, reason

if TYPE_CHECKING:
    from torch import Tensor

MAX_PIXELS = 50_000_000
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # none that runs another program, as EPS does


class ImageFile(NamedTuple):
    """An image that is to be read.

    Attributes:
        file: where it lies.
        where: how messages call the row that names it.
    """

    file: Path
    where: str


class Picture(NamedTuple):
    """An image in memory.

    Attributes:
        pixels: as Pillow has it, in RGB.
    """

    pixels: Any

    def __str__(self) -> str:
        return f"image of {self.pixels.width} × {self.pixels.height} pixels"


def as_images(rows: Sequence[Any]) -> list[ImageFile | Picture] | Tensor | None:
    """Rows that are images; None where they are something else.

    Args:
        rows: `ImageFile`, images of Pillow or arrays (see `image_of`) for all; or finished pixel values for all (see
            `pixel_values_of`).

    Returns:
        what an image processor is to read, or the pixel values (rows, channels, height, width).

    Raises:
        UsageError: some are images, and some are not.
    """
    if (values := pixel_values_of(rows)) is not None:
        return values
    found = [row if isinstance(row, ImageFile) else image_of(row) for row in rows]
    images = [row for row in found if row is not None]
    if not images:
        return None
    if len(images) < len(found):
        raise UsageError("Some inputs are images, and some are none. Give all as images, or none.")
    return images


def image_of(given: Any) -> Picture | None:
    """What somebody gives as an image, as one in RGB; None where it is none.

    Args:
        given: an image of Pillow, or an array or tensor of whole numbers from 0 to 255: (height, width), (height,
            width, 1, 3 or 4) or (1, 3 or 4, height, width).

    Raises:
        UsageError: an array of another kind, or one whose channels cannot be told.

    Example:
        >>> import numpy as np
        >>> str(image_of(np.zeros((8, 6, 3), np.uint8))), image_of("a text")
        ('image of 6 × 8 pixels', None)
    """
    if isinstance(given, Picture):
        return given
    if type(given).__module__.partition(".")[0] == "PIL":
        return Picture(_in_rgb(given))
    if not hasattr(given, "dtype") or getattr(given, "ndim", 0) < 2:
        return None
    import numpy as np

    array = np.asarray(given.cpu() if hasattr(given, "cpu") else given)
    if array.dtype != np.uint8 or array.ndim > 3:
        raise UsageError(
            f"An array of {array.dtype} and shape {list(array.shape)} is no image. Give whole numbers from 0 to 255 as "
            "uint8, (height, width, 3); or finished pixel values as a float tensor (rows, channels, height, width)."
        )
    if array.ndim == 3:
        last, first = array.shape[-1] in (1, 3, 4), array.shape[0] in (1, 3, 4)
        if last == first:
            raise UsageError(
                f"Which axis of {list(array.shape)} has the colours cannot be told. Give an image of Pillow, or "
                "(height, width, 3)."
            )
        array = array if last else array.transpose(1, 2, 0)
        array = array[..., 0] if array.shape[-1] == 1 else array
    return Picture(_pillow().fromarray(np.ascontiguousarray(array)).convert("RGB"))


def named(row: Any) -> Any:
    """How results call an input: what it is of an image in memory; anything else as it is.

    Example:
        >>> import numpy as np
        >>> named(np.zeros((8, 6, 3), np.uint8)), named("a text")
        ('image of 6 × 8 pixels', 'a text')
    """
    if pixel_values_of([row]) is not None:
        return f"pixel values of {row.shape[-1]} × {row.shape[-2]}"
    if isinstance(row, (str, tuple)) and not isinstance(row, Picture):
        return row
    found = image_of(row)
    return row if found is None else str(found)


def pixel_values_of(rows: Sequence[Any]) -> Tensor | None:
    """Rows that are finished pixel values, as a batch (rows, channels, height, width); None where they are something
    else.

    Args:
        rows: a float tensor of all rows, or a list of float tensors (channels, height, width).

    Raises:
        UsageError: some are, and some are not; rows of different shapes.
    """
    if "torch" not in sys.modules:
        return None
    import torch

    is_one = [isinstance(row, torch.Tensor) and row.is_floating_point() and row.dim() == 3 for row in rows]
    if not any(is_one):
        return None
    if not all(is_one) or len({tuple(row.shape) for row in rows}) > 1:
        raise UsageError("Pixel values are float tensors of one shape for all rows. Give all of them so.")
    return torch.stack(list(rows))


class ImageEncoder:
    """The image processor of a folder.

    Args:
        folder: of the model.

    Raises:
        TwinmergeError: it has none that can be read.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import AutoImageProcessor

        check_settings(folder)
        try:
            self.processor: Any = AutoImageProcessor.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # transformers raises many kinds here; the user needs one sentence
            raise ModelError(
                f"{folder} has no image processor that can be read ({reason(error)}). Copy preprocessor_config.json "
                "into it."
            ) from error

    def encode(self, rows: Sequence[ImageFile | Picture]) -> dict[str, Tensor]:
        """The images as a batch, as the processor gives it.

        Args:
            rows: files, or images in memory.

        Raises:
            TwinmergeError: a file that is no image, or one of too many pixels.
        """
        images = [row.pixels if isinstance(row, Picture) else read_image(*row) for row in rows]
        return dict(self.processor(images=images, return_tensors="pt"))


def read_image(file: Path, where: str) -> Any:
    """An image in RGB, as Pillow has it.

    Raises:
        TwinmergeError: no image, one of too many pixels, or no Pillow.
    """
    Image = _pillow()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ValueError(f"{image.width} × {image.height} pixels are more than {MAX_PIXELS}")
                return _in_rgb(image)
    except Exception as error:  # Pillow's readers raise many kinds for files that are not right
        raise DataError(
            f"{where}: {file} is no image that can be read ({error}). Mend it, or leave its row out."
        ) from error


def _in_rgb(image: Any) -> Any:
    """An image of Pillow in RGB.

    Raises:
        UsageError: one of more than 8 bits, which Pillow would cut at 255 without a word.
    """
    if image.mode not in (
        "1",
        "L",
        "LA",
        "P",
        "PA",
        "RGB",
        "RGBA",
        "RGBX",
        "CMYK",
        "YCbCr",
        "LAB",
        "HSV",
        "La",
        "RGBa",
    ):
        raise UsageError(
            f"An image of the mode {image.mode!r} has more than 8 bits a colour. Bring it to 8 bits first."
        )
    return image.convert("RGB")


def _pillow() -> Any:
    """Pillow's module of images.

    Raises:
        ResourceError: it is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ResourceError("Reading images takes Pillow. Install it: pip install pillow.") from error
    return Image
