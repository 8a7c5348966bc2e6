"""A folder of images, one sub-folder per class, as batches of rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from exitcompiler.errors import CalibrationError, ExitCompilerError, InputError

__all__ = ["ImageFolder", "ImagePreprocessing"]

_SUFFIXES: Final = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
_BATCH_ROWS: Final = 64
_MODES: Final = {1: "L", 3: "RGB"}


@dataclass(frozen=True, slots=True)
class ImagePreprocessing:
    """What is done to an image after it was resized: ``(pixel / 255 - mean) / std``, per channel.

    Args:
        mean: One number for all channels, or one per channel, in 0..1.
        std: The same; above 0.
        size: ``(height, width)`` to resize to; None: the model's input size.
    """

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    size: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class ImageFolder:
    """A re-iterable source of batches; one batch is in memory at a time.

    Classes are numbered by their folders' names in alphabetical order. Rows come in a shuffled order
    that is always the same, so that every batch holds several classes.

    Args:
        files: Images with their class numbers, in order.
        classes: Folder names by class number.
        shape: Channels, height, width.
        preprocessing: What is done to each image.
    """

    files: tuple[tuple[Path, int], ...]
    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    preprocessing: ImagePreprocessing

    @classmethod
    def open(
        cls,
        folder: Path,
        input_shape: tuple[int | str, ...] | None,
        preprocessing: ImagePreprocessing,
        where: str,
    ) -> ImageFolder:
        """List the images of a folder.

        Args:
            folder: Holds one folder per class.
            input_shape: ``(batch, channels, height, width)`` of the model's input, if known.
            preprocessing: What is done to each image.
            where: What to call the folder in messages.

        Raises:
            InputError: The size is not known, or the preprocessing does not fit it.
            CalibrationError: There are no classes, or no images.
        """
        shape = _image_shape(input_shape, preprocessing, where)
        classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
        files = [
            (file, number)
            for number, name in enumerate(classes)
            for file in sorted((folder / name).iterdir())
            if file.suffix.lower() in _SUFFIXES
        ]
        if not files:
            raise CalibrationError(
                f"{len(classes)} class folders, no images",
                where=where,
                remedy="put the images of each class into a folder of its own: "
                + ", ".join(sorted(_SUFFIXES)),
            )
        order = np.random.default_rng(0).permutation(len(files))
        return cls(tuple(files[i] for i in order), tuple(classes), shape, preprocessing)

    def __len__(self) -> int:
        return -(-len(self.files) // _BATCH_ROWS)

    def __iter__(self) -> Iterator[tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]]:
        for start in range(0, len(self.files), _BATCH_ROWS):
            part = self.files[start : start + _BATCH_ROWS]
            yield np.stack([self._read(file) for file, _ in part]), np.array([label for _, label in part])

    def _read(self, file: Path) -> npt.NDArray[np.float32]:
        image_module = _pillow()
        channels, height, width = self.shape
        try:
            with image_module.open(file) as image:
                colored = image.convert(_MODES[channels])
                resized = colored.resize((width, height), image_module.Resampling.BILINEAR)
        except (OSError, image_module.DecompressionBombError, image_module.DecompressionBombWarning) as error:
            raise CalibrationError(f"cannot be read as an image: {error}", where=str(file)) from error
        pixels = np.asarray(resized, np.float32).reshape(height, width, channels).transpose(2, 0, 1) / 255.0
        mean = np.asarray(self.preprocessing.mean, np.float32).reshape(-1, 1, 1)
        std = np.asarray(self.preprocessing.std, np.float32).reshape(-1, 1, 1)
        return np.ascontiguousarray((pixels - mean) / std, np.float32)


def _image_shape(
    input_shape: tuple[int | str, ...] | None, preprocessing: ImagePreprocessing, where: str
) -> tuple[int, int, int]:
    if input_shape is None:
        if preprocessing.size is None:
            raise InputError(
                "the size of the model's images is not known",
                where=where,
                remedy="give --image-size HEIGHTxWIDTH",
            )
        shape = (3, *preprocessing.size)
    else:
        if len(input_shape) != 4 or input_shape[1] not in _MODES:
            raise InputError(
                f"the model's input {input_shape} is not a batch of images with 1 or 3 channels",
                where=where,
                remedy="give the rows as an .npz file",
            )
        sizes = [size for size in input_shape[1:] if isinstance(size, int)]
        if preprocessing.size is not None:
            sizes = [int(input_shape[1]), *preprocessing.size]
        if len(sizes) != 3:
            raise InputError(
                f"the model takes images of any size {input_shape}",
                where=where,
                remedy="give --image-size HEIGHTxWIDTH",
            )
        shape = (sizes[0], sizes[1], sizes[2])
    for name, values in (("mean", preprocessing.mean), ("std", preprocessing.std)):
        if len(values) not in (1, shape[0]):
            raise InputError(f"--{name} has {len(values)} numbers for {shape[0]} channels", where=where)
    if not all(value > 0 for value in preprocessing.std):
        raise InputError("--std must be above 0", where=where)
    return shape


def _pillow() -> Any:
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise ExitCompilerError(
            "folders of images need pillow", remedy="pip install 'exitcompiler[cli]'"
        ) from error
    return Image
