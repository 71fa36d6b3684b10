"""A model as a worker serves it, without a worker."""

from __future__ import annotations

from pathlib import Path

from inferq.shared.names import Names
from inferq.workers.claims.clock import RedisClock
from inferq.workers.data_plane.loading import LoadingModel
from inferq.workers.data_plane.served_model import ServedModel
from inferq.workers.models.repository import load_model


def served_model(root: Path, name: str) -> ServedModel:
    """The model `name` of the repository `root`, loaded. Close it. Nobody hears of its batches."""
    return LoadingModel(load_model(root, name)).load(
        "worker",
        Names(),
        RedisClock(),
        is_revoked=lambda _: False,
        on_finished=lambda _: None,
        result_expires_s=60,
    )
