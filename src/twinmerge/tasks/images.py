"""Images to tensors, by the image processor that lies beside a model."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from twinmerge.errors import DataError, ModelError, ResourceError
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

    def encode(self, rows: Sequence[ImageFile]) -> dict[str, Tensor]:
        """The images as a batch, as the processor gives it.

        Raises:
            TwinmergeError: a file that is no image, or one of too many pixels.
        """
        return dict(self.processor(images=[read_image(*row) for row in rows], return_tensors="pt"))


def read_image(file: Path, where: str) -> Any:
    """An image in RGB, as Pillow has it.

    Raises:
        TwinmergeError: no image, one of too many pixels, or no Pillow.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ResourceError("Reading images takes Pillow. Install it: pip install pillow.") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ValueError(f"{image.width} × {image.height} pixels are more than {MAX_PIXELS}")
                return image.convert("RGB")
    except Exception as error:  # Pillow's readers raise many kinds for files that are not right
        raise DataError(
            f"{where}: {file} is no image that can be read ({error}). Mend it, or leave its row out."
        ) from error
