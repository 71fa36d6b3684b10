"""Stock Flower with correct queue depths, a page Inference, and a password unless on loopback."""

from __future__ import annotations

from pathlib import Path
from typing import Final

#: For ``celery -A inferq.workers.app flower --conf=…``.
CONF: Final = Path(__file__).with_name("flowerconfig.py")
