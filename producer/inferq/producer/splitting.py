"""A request of more rows than a batch may have: several requests, and one result of them all."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from inferq.producer.pending import PendingRequest, Result
from inferq.shared.errors import EngineError, InferqError
from inferq.shared.schema import Array, ModelAdvert, Signature, Tensors


def pieces(advert: ModelAdvert, arrays: Tensors) -> Iterator[dict[str, Array]]:
    """`arrays` in pieces of `max_batch_size` rows; what has no rows is in each of them."""
    inputs, most = advert.signature.inputs, advert.max_batch_size
    first = inputs[0]
    rows = arrays[first.name].shape[first.batch_axis]
    for begin in range(0, rows, most):
        piece = dict(arrays)
        for spec in inputs:
            place = (slice(None),) * spec.batch_axis + (slice(begin, begin + most),)
            piece[spec.name] = np.ascontiguousarray(arrays[spec.name][place])
        yield piece


class Joiner:
    """Resolves the whole once its parts are: with all their rows, or with the first error.

    A `pending.Watcher` of the parts.
    """

    def __init__(
        self, whole: PendingRequest, parts: Sequence[PendingRequest], signature: Signature
    ) -> None:
        self._whole = whole
        self._parts = parts
        self._axes = {spec.name: spec.batch_axis for spec in signature.outputs}
        self._counting = threading.Lock()
        self._left = len(parts)

    def resolved(self, pending: PendingRequest) -> None:
        """See `pending.Watcher`."""
        with self._counting:
            self._left -= 1
            left = self._left
        if isinstance(pending.outcome, InferqError):
            self._whole.resolve(pending.outcome)
        elif not left:
            self._whole.resolve(self._joined())

    def forked(self) -> None:
        """See `pending.Watcher`."""
        self._counting = threading.Lock()
        if self._whole.watcher is not None:
            self._whole.watcher.forked()

    def _joined(self) -> Result | InferqError:
        results = [part.outcome for part in self._parts if isinstance(part.outcome, Result)]
        last = max(results, key=lambda result: result.latency_ms)
        try:
            outputs = {
                name: _concatenated([result.outputs[name] for result in results], axis)
                for name, axis in self._axes.items()
                if name in last.outputs
            }
        except (KeyError, ValueError) as problem:
            return EngineError(
                f"request {self._whole.request_id}: its {len(results)} parts have outputs that "
                f"cannot be joined: {problem}"
            )
        return Result(outputs, last.receipt, self._whole.request_id, last.latency_ms, last.labels)


def _concatenated(arrays: Sequence[Array], axis: int) -> Array:
    joined: Array = np.concatenate(arrays, axis)
    joined.flags.writeable = False
    return joined


def is_beyond_a_batch(advert: ModelAdvert, detail: Mapping[str, object]) -> bool:
    """Whether a request was refused for nothing but too many rows; `detail`: of the refusal."""
    return advert.batchable and bool(detail.get("rows"))
