"""What a fake client serves: classes of `inferq.model`, objects of them, or functions."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from inferq.model import Answer, Context, Model
from inferq.model.answers import read_answer
from inferq.model.declared import signature_of
from inferq.shared.errors import ConfigError
from inferq.shared.names import is_model_name
from inferq.shared.schema import DTYPES, Array, ModelAdvert, Tensors

VERSION: Final = 1
ENGINE: Final = "python"
#: The defaults of model.toml.
DEFAULT_MAX_BATCH_SIZE: Final = 32
DEFAULT_MAX_REQUEST_BYTES: Final = 64 << 20


@dataclass(frozen=True)
class FakeModel:
    """A model and those knobs of its model.toml that clients check requests against."""

    model: Model | type[Model]
    #: Rows.
    max_batch_size: int = DEFAULT_MAX_BATCH_SIZE
    #: Bytes of one request's inputs.
    max_request_bytes: int = DEFAULT_MAX_REQUEST_BYTES


Served = FakeModel | Model | type[Model]


def fake_model(
    *,
    inputs: Mapping[str, str],
    outputs: Mapping[str, str],
    run: Callable[[dict[str, Any]], Answer],
    max_batch_size: int = DEFAULT_MAX_BATCH_SIZE,
    max_request_bytes: int = DEFAULT_MAX_REQUEST_BYTES,
) -> FakeModel:
    """A model that answers what the function `run` does.

    `inputs` and `outputs` are written as in a class of `inferq.model`: name → ``dtype[dims]``.
    `run` is given one request's arrays by name, and gives back what `Model.run` may.
    """
    attributes = {"inputs": inputs, "outputs": outputs, "run": lambda _, arrays: run(arrays)}
    model = type("FakeModel", (Model,), attributes)()
    return FakeModel(model, max_batch_size, max_request_bytes)


class LoadedModel:
    """A model that is served. Any thread may run it; one at a time does."""

    def __init__(self, name: str, model: Model, advert: ModelAdvert) -> None:
        self.name = name
        self.advert = advert
        self._model = model
        self._dtypes = {spec.name: DTYPES[spec.dtype] for spec in advert.signature.outputs}
        # Its code may ask the client for another model, or for itself.
        self._running = threading.RLock()

    def rows(self, inputs: Tensors) -> int:
        """How many rows a request of `inputs` has."""
        first = self.advert.signature.inputs[0].name
        return int(inputs[first].shape[0]) if self.advert.batchable else 1

    def run(self, inputs: Tensors) -> dict[str, Array]:
        """The outputs of one request. Raises what the code raises, a row's RequestError,
        EngineError."""
        signature = self.advert.signature
        rows = self.rows(inputs) if self.advert.batchable else None
        with self._running:
            # It may write to its inputs, and may use the memory of its outputs again.
            answer = self._model.run({name: array.copy() for name, array in inputs.items()})
            outputs, errors = read_answer(answer, signature, inputs, rows)
            for error in errors.values():
                raise error
            return {name: np.array(outputs[name], dtype) for name, dtype in self._dtypes.items()}


def load(models: Mapping[str, Served]) -> dict[str, LoadedModel]:
    """`models` by name, loaded. ConfigError names the one that is wrong."""
    if not isinstance(models, Mapping):
        raise ConfigError(f"models are {models!r:.100}; expected a mapping of name to model")
    return {name: _load(name, served) for name, served in models.items()}


def _load(name: str, served: Served) -> LoadedModel:
    if not isinstance(name, str) or not is_model_name(name):
        raise ConfigError(
            f"model {name!r:.120}; expected at most 100 letters, digits or '_.-' that start with "
            "none of '.-'"
        )
    knobs = served if isinstance(served, FakeModel) else FakeModel(served)
    model = knobs.model
    is_class = isinstance(model, type) and issubclass(model, Model)
    if not is_class and not isinstance(model, Model):
        raise ConfigError(
            f"model {name!r} is {model!r:.100}; expected a class that derives from "
            "inferq.model.Model, an object of one, or what fake_model makes of a function"
        )
    for knob in ("max_batch_size", "max_request_bytes"):
        value = getattr(knobs, knob)
        if type(value) is not int or value < 1:
            raise ConfigError(
                f"{knob} of model {name!r} is {value!r:.100}; expected a whole number above 0"
            )
    signature = signature_of(model if isinstance(model, type) else type(model))
    if isinstance(model, type):
        model = model()
        model.load(Context(Path()))
    advert = ModelAdvert(
        name=name,
        version=VERSION,
        engine=ENGINE,
        signature=signature,
        max_batch_size=knobs.max_batch_size,
        batchable=signature.batch_symbol is not None,
        max_queue_depth=0,
        max_request_bytes=knobs.max_request_bytes,
        default_priority=0,
        default_timeout_ms=0,
        seconds_per_row=0.0,
    )
    return LoadedModel(name, model, advert)
