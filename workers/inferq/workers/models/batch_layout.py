"""Where a file has its rows: in another dim than the first, or in a first dim of fixed size.

Everything from intake to results has rows in dim 0, and as many as there are. These adapters stand
around a model that has them elsewhere (the states of an LSTM: layers, batch, hidden), or that takes
8 rows and no fewer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from msgspec.structs import replace as changed

from inferq.shared.errors import ConfigError
from inferq.shared.schema import Array, Signature, Tensors, TensorSpec
from inferq.workers.models.engine import Batch, Lane, LoadedModel, gather, without_padding
from inferq.workers.models.lane_wrapper import WrappedLane, in_each
from inferq.workers.models.signatures import Declared

#: Tensor → the dim that its rows are, where that is not dim 0.
Axes = Mapping[str, int]


def moved(arrays: Tensors, axes: Axes) -> dict[str, Array]:
    """`arrays` with their rows in dim 0."""
    return {
        name: np.moveaxis(array, axes[name], 0)
        if axes.get(name, array.ndim) < array.ndim
        else array
        for name, array in arrays.items()
    }


def moved_back(arrays: Tensors, axes: Axes) -> dict[str, Array]:
    """`arrays`, whose rows are in dim 0, as the file has them."""
    return {
        name: np.moveaxis(array, 0, axes[name]) if name in axes else array
        for name, array in arrays.items()
    }


def rows_first(declared: Declared, axes: Axes) -> Declared:
    """`declared` with the rows of all tensors in dim 0. ConfigError: `axes` names none of them."""
    if not axes:
        return declared
    signature, probe = declared.signature, declared.probe
    ranks = {spec.name: len(spec.shape) for spec in signature.inputs + signature.outputs}
    for name, axis in axes.items():
        if name not in ranks:
            raise ConfigError(
                f"batch_axis names {name!r}; expected an input or output: {', '.join(ranks)}"
            )
        if axis >= ranks[name]:
            raise ConfigError(
                f"batch_axis.{name} is {axis}; expected less than {ranks[name]}, the number of dims"
            )

    def run(inputs: Tensors) -> Mapping[str, Array]:
        assert probe is not None
        return moved(probe(contiguous(moved_back(inputs, axes))), axes)

    inputs, outputs = (
        tuple(_rows_first(spec, axes) for spec in specs)
        for specs in (signature.inputs, signature.outputs)
    )
    layout = changed(signature, inputs=inputs, outputs=outputs)
    return replace(declared, signature=layout, probe=probe and run)


def _rows_first(spec: TensorSpec, axes: Axes) -> TensorSpec:
    dims, axis = list(spec.shape), axes.get(spec.name, 0)
    return TensorSpec(spec.name, spec.dtype, (dims.pop(axis), *dims)) if axis else spec


def contiguous(arrays: Tensors) -> dict[str, Array]:
    """`arrays` as engines take them."""
    return {name: np.ascontiguousarray(array) for name, array in arrays.items()}


class _RowsElsewhere(WrappedLane):
    """A lane of a model whose file has rows in other dims."""

    def __init__(self, lane: Lane, axes: Axes) -> None:
        super().__init__(lane)
        self._axes = axes

    def run(self, batch: Batch) -> Mapping[str, Array]:
        inputs = contiguous(moved_back(gather(batch), self._axes))
        whole = Batch([inputs], 1, 1, False, outputs=batch.outputs)
        return without_padding(batch, moved(self._lane.run(whole), self._axes))


def laid_out(loaded: LoadedModel) -> LoadedModel:
    """`loaded`, whose lanes take and give rows in dim 0."""
    axes = loaded.spec.config.batch_axis
    if not axes:
        return loaded
    return in_each(loaded, lambda lane: _RowsElsewhere(lane, axes))


# --- a batch of fixed size -----------------------------------------------------------------------


def fixed_batch(signature: Signature) -> int:
    """The size that dim 0 of all inputs and outputs has; 0: there is no such, or it is 1."""
    firsts = {spec.shape[0] if spec.shape else 0 for spec in signature.inputs}
    size = firsts.pop() if len(firsts) == 1 else 0
    if not isinstance(size, int) or size < 2:
        return 0
    follow = all(spec.shape and spec.shape[0] == size for spec in signature.outputs)
    return size if follow else 0


def filled(declared: Declared, size: int) -> Declared:
    """`declared`, which takes `size` rows, as one that takes up to so many."""
    probe, signature = declared.probe, declared.signature

    def run(inputs: Tensors) -> Mapping[str, Array]:
        assert probe is not None
        rows = len(next(iter(inputs.values())))
        if rows > size:
            raise ValueError(f"{rows} rows; expected at most {size}")
        place = np.minimum(np.arange(size), rows - 1)
        outputs = probe({name: array[place] for name, array in inputs.items()})
        return {
            name: array[:rows] if array.ndim and len(array) == size else array
            for name, array in outputs.items()
        }

    inputs, outputs = (
        tuple(TensorSpec(spec.name, spec.dtype, (None, *spec.shape[1:])) for spec in specs)
        for specs in (signature.inputs, signature.outputs)
    )
    layout = changed(signature, inputs=inputs, outputs=outputs)
    return replace(declared, signature=layout, probe=probe and run)
