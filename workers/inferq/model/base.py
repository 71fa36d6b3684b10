"""The class that a model.py derives its own from, and what that is given to load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import msgspec

from inferq.shared.errors import RequestError

#: What `Model.run` may give back.
Answer = Mapping[str, Any] | Sequence[Mapping[str, Any] | RequestError] | RequestError


class Context(msgspec.Struct, frozen=True):
    """Where a model is loaded."""

    #: The version's folder, which holds model.py.
    folder: Path
    #: ``cpu``, or ``cuda:0``: the GPU of its worker.
    device: str = "cpu"
    #: ``[python.config]`` of model.toml.
    config: Mapping[str, Any] = {}


class Model:
    """Derive one class from it in model.py. Each lane has an object of that class of its own.

    `inputs` and `outputs` name the tensors, each as ``dtype[dims]``. A dim is a size, a name (dims
    of one name have one size within a request) or ``?``. If the first dim of all of them has one
    name, requests share batches: each row's answer must not depend on the rows beside it.
    """

    inputs: ClassVar[Mapping[str, str]] = {}
    outputs: ClassVar[Mapping[str, str]] = {}

    def load(self, context: Context) -> None:
        """Read weights, open what `run` needs. Called once for each lane, before its first batch.

        What it raises keeps the model from being served.
        """

    def run(self, inputs: dict[str, Any]) -> Answer:
        """Answer one batch: input name → array in, output name → array (or list) out.

        Or a list with one entry for each row: that row's outputs by name, or a RequestError, with
        which that row's request fails alone. Whatever it raises fails the batch, which is then run
        again in halves, until the request that does it is by itself. The inputs may be written to,
        and are gone once it returns: copy what is to be kept.
        """
        raise NotImplementedError
