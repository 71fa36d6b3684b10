"""How many bytes of requests a worker holds: of all its models together, and of each.

A request counts from its claim until Redis has answered what settles it: for so long its inputs,
its outputs or both are in memory. Half of the budget is divided among the models, so that nobody's
large requests keep the others' out; the other half is for whoever needs it. How large requests are
is not known before they are claimed, so the last ones tell.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, Protocol

from inferq.shared.schema import (
    DTYPES,
    ModelAdvert,
    Tensors,
    TensorSpec,
    is_text,
    most_bytes,
)
from inferq.shared.text import HELD_EACH, held_bytes
from inferq.workers.claims.claim import Claim
from inferq.workers.process import shares

#: What a worker holds at most, as far as it knows sizes: a multiple of it is in use meanwhile,
#: since a batch is put together, and its results are written out, in memory of their own.
MAX_BUDGET_BYTES: Final = 512 * 1024 * 1024
#: It is less where there is little memory: one part of so many.
_MEMORY_PARTS: Final = 16
#: How much the newest claim or batch weighs in the mean size, if it was of small requests.
_WEIGHT: Final = 0.1
#: CPU seconds that reading one claim may take. Meanwhile nothing of any model is settled or formed.
READING_S: Final = 0.25


def budget_bytes() -> int:
    """What all models of this process may hold together on this machine.

    Of the processes that share a device, all together hold as much as one would alone.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return shares.share(min(MAX_BUDGET_BYTES, memory // _MEMORY_PARTS))


class Sizes:
    """Bytes of one model's requests, rather too many than too few.

    Large ones are believed at once, small ones by and by. Until one was seen: as large as can be.
    """

    def __init__(self, advert: ModelAdvert) -> None:
        #: Of one request's inputs, and of its outputs: first of one row, as far as that is fixed.
        self.inputs = max(1, most_bytes(advert))
        self.outputs = _row_bytes(advert)
        #: Whether inputs are objects in memory, which take more than their bytes.
        self.of_text = any(is_text(spec.dtype) for spec in advert.signature.inputs)
        #: Whether outputs are as large whatever the inputs are.
        self._fixed = all(_row_is_fixed(spec) for spec in advert.signature.outputs)
        self._claimed: float | None = None
        self._computed: float | None = None
        #: Bytes of the inputs of which those outputs came.
        self._came_of = 1.0
        #: CPU seconds that reading one request takes.
        self._reading_s = 0.0

    def read(self, mean_s: float) -> None:
        """The mean CPU seconds of reading one claim's requests."""
        self._reading_s = _smoothed(self._reading_s, mean_s)

    @property
    def at_once(self) -> int:
        """How many may be claimed at once, one at least: some take long to read."""
        return max(1, int(READING_S / max(self._reading_s, 1e-6)))

    def whole(self, inputs: int) -> int:
        """Bytes of a request with so many bytes of inputs, its outputs included."""
        if self._fixed or inputs <= self._came_of:
            return inputs + self.outputs
        return inputs + math.ceil(self.outputs * inputs / self._came_of)

    def claimed(self, mean: float) -> None:
        """The mean of the inputs of one claim's requests."""
        self._claimed = _smoothed(self._claimed, mean)
        self.inputs = max(1, math.ceil(self._claimed))

    def computed(self, inputs: Tensors, outputs: Tensors) -> None:
        """One request; of each batch one is looked at."""
        came, came_of = _bytes_of(outputs), max(1, _bytes_of(inputs))
        self._computed = _smoothed(self._computed, came)
        self.outputs = math.ceil(self._computed)
        self._came_of = came_of if self._computed == came else self._came_of


def _smoothed(known: float | None, new: float) -> float:
    return new if known is None else max(new, known + _WEIGHT * (new - known))


def _bytes_of(tensors: Tensors) -> int:
    return sum(
        held_bytes(array) if array.dtype.hasobject else array.nbytes for array in tensors.values()
    )


def beside_bytes(tensors: Tensors) -> int:
    """About what the elements of text take in memory besides their bytes."""
    return HELD_EACH * sum(array.size for array in tensors.values() if array.dtype.hasobject)


def _row_is_fixed(spec: TensorSpec) -> bool:
    return not is_text(spec.dtype) and all(isinstance(dim, int) for dim in spec.row_shape)


def _row_bytes(advert: ModelAdvert) -> int:
    return sum(
        math.prod(dim for dim in spec.row_shape if isinstance(dim, int))
        * (HELD_EACH if is_text(spec.dtype) else DTYPES[spec.dtype].itemsize)
        for spec in advert.signature.outputs
    )


class Holder(Protocol):
    """A model, as far as its budget goes."""

    name: str
    sizes: Sizes


class _Share:
    """What one model holds."""

    def __init__(self, model: Holder) -> None:
        self.model = model
        self.bytes = 0
        #: Of these: of payloads that are not fetched yet.
        self.unfetched = 0
        #: Priority step → requests.
        self.requests: dict[int, int] = {}


class Budget:
    """Owned by the data plane's thread. Loses no byte: what is counted in is counted out."""

    def __init__(self, models: Iterable[Holder], total: int) -> None:
        self._shares: Mapping[str, _Share] = {model.name: _Share(model) for model in models}
        self._own = total // 2 // max(1, len(self._shares))
        self._common = total // 2
        #: Bytes that models hold beyond their own parts.
        self._beyond = 0

    def own_left(self, model: str) -> int:
        """Bytes that `model` may take on whatever the others hold."""
        return max(0, self._own - self._shares[model].bytes)

    def common_left(self) -> int:
        """Bytes that any model may take on beyond that."""
        return max(0, self._common - self._beyond)

    def each(self, model: str) -> int:
        """Bytes that the next request of `model` takes, as far as can be foreseen."""
        sizes = self._shares[model].model.sizes
        return sizes.whole(sizes.inputs)

    def at_once(self, model: str) -> int:
        """Most requests of `model` that one claim may have, by how long reading them takes."""
        return self._shares[model].model.sizes.at_once

    def idle(self, model: str, step: int) -> bool:
        """Whether `model` holds none as urgent as `step`: then it may have one of any size."""
        held = self._shares[model].requests
        return not any(count for urgent, count in held.items() if urgent <= step)

    def fetchable(self, model: str) -> int:
        """Bytes of payloads of `model`'s that may be fetched; any one, if it holds none."""
        share = self._shares[model]
        fetched = share.bytes - share.unfetched
        others = self._beyond - max(0, share.bytes - self._own)
        return max(0, self._own + max(0, self._common - others) - fetched)

    def claimed(
        self, claim: Claim, places: Sequence[int], inputs: int, whole: Mapping[int, int]
    ) -> None:
        """Count in the requests of `claim` at `places`, with `inputs` bytes in all.

        `whole`: place → bytes that a request with payloads takes whole, fetched or not.
        """
        if not places:
            return
        share = self._shares[claim.model]
        mean = inputs // len(places)
        each = share.model.sizes.whole(mean)
        share.model.sizes.claimed(mean)
        if claim.held:  # more of a claim that is known
            whole = {place: whole.get(place, each) for place in places}
        else:
            claim.each = each
        claim.held += len(places)
        claim.whole.update(whole)
        nbytes = sum(whole.values()) + (len(places) - len(whole)) * each
        self._add(share, claim.step, len(places), nbytes)

    def settled(self, claim: Claim) -> None:
        """Count out what of `claim` is settled by now."""
        gone = claim.held - (claim.size - len(claim.settled))
        claim.held -= gone
        settled = [place for place in claim.whole if place in claim.settled]
        nbytes = sum(map(claim.whole.pop, settled)) + (gone - len(settled)) * claim.each
        self._add(self._shares[claim.model], claim.step, -gone, -nbytes)

    def postponed(self, model: str, nbytes: int) -> None:
        """So many bytes of what was claimed are not fetched yet; negative: they are now."""
        self._shares[model].unfetched += nbytes

    def clear(self) -> None:
        """Nothing is held any more."""
        for share in self._shares.values():
            share.bytes = share.unfetched = 0
            share.requests.clear()
        self._beyond = 0

    def _add(self, share: _Share, step: int, count: int, nbytes: int) -> None:
        before = max(0, share.bytes - self._own)
        share.requests[step] = share.requests.get(step, 0) + count
        share.bytes += nbytes
        self._beyond += max(0, share.bytes - self._own) - before
