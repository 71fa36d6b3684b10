"""Checks, by padded and unpadded runs, whether a model may be padded as its model.toml says."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Final

import numpy as np

from inferq.shared.errors import ConfigError
from inferq.shared.schema import DTYPES, Array, Signature, Tensors, is_text
from inferq.workers.batching.padding import Measured, Padding, PadRule, padded_dims
from inferq.workers.logs.fields import about
from inferq.workers.models.engine import Batch, LoadedModel, answers
from inferq.workers.models.ranges import toml_key
from inferq.workers.pad_probe.comparisons import Changed, Comparisons
from inferq.workers.pad_probe.sizes import SizeProbe
from inferq.workers.pad_probe.trials import Run, Trials

logger = logging.getLogger(__name__)

#: Seconds for the whole check. After them the least telling comparisons are left out, never the
#: first.
BUDGET_S: Final = 10.0
#: Seconds to find other values to suggest when [pad] is refused.
ADVICE_S: Final = 5.0


def probe_padding(model: LoadedModel) -> Padding:
    """The `Padding` of a loaded `model`. ConfigError with the reason if padding is wrong for it.

    Runs it on the first lane, which nothing else may use yet.
    """
    spec, lane = model.spec, model.lanes[0]
    bucket = model.buckets[0] if model.buckets and spec.batchable else 1  # the bucket of one row

    def run(inputs: Tensors) -> Mapping[str, Array]:
        return answers(lane, Batch([inputs], 1, bucket, spec.batchable))

    return measured_padding(
        spec.signature,
        spec.config.pad,
        run,
        batch=spec.batch_symbol,
        known=spec.config.known_sizes,
        name=spec.name,
        rounding=model.rounding,
    )


def measured_padding(
    signature: Signature,
    rules: Mapping[str, PadRule],
    run: Run,
    *,
    batch: str | None,
    known: Mapping[str, int] = MappingProxyType({}),
    name: str = "",
    rounding: float = 1.0,
    seconds: float = BUDGET_S,
) -> Padding:
    """The same for a model that `run` runs.

    `batch`: the batch symbol; one row is run at a time. None: it is not batchable. `known`: symbol
    → a size that it may have.
    """
    if not rules:
        return Padding(signature, rules)
    trials = Trials(run, seconds)
    sizes = SizeProbe(signature, rules, trials, batch=batch, known=known)
    measured = sizes.measured()
    comparisons = Comparisons(signature, rules, measured, sizes, trials, rounding=rounding)
    changed = comparisons.first_change()
    if changed is not None:
        padded = ", ".join(f"pad.{symbol}" for symbol in changed.case.padded)
        advice = _advice(signature, measured, sizes, changed, comparisons, run, rounding)
        raise ConfigError(f"{padded}: answers change {changed}; {advice}")
    for symbol, made in comparisons.made.items():
        if not made and _padded_sizes(rules[symbol]):
            last = rules[symbol].buckets[-1]
            todo = "sizes between its buckets that the model takes unpadded, too"
            if trials.not_built:
                todo = f"in model.toml: [profile] {toml_key(symbol)} = [1, {last}, {last}]"
            raise ConfigError(
                f"pad.{symbol}: no size that is padded could be compared with an unpadded run "
                f"({trials.reason}); expected {todo}"
            )
    logger.info(
        "model %s: padded as it says, in %d runs that took %.1f s answers stay as they are%s",
        name,
        trials.runs,
        trials.took_s,
        _describe_growth(measured),
        extra=about(model=name),
    )
    if comparisons.left_out:
        logger.warning(
            "model %s: [pad] was probed for %.0f s only, so %d of %d comparisons were left out",
            name,
            trials.took_s,
            comparisons.left_out,
            comparisons.left_out + sum(comparisons.made.values()),
            extra=about(model=name),
        )
    return comparisons.padding


def _padded_sizes(rule: PadRule) -> bool:
    """Whether any size is not a bucket."""
    return rule.buckets[-1] > len(rule.buckets)


def _describe_growth(measured: Measured) -> str:
    told = [
        f"dim {axis} of {output} follows {symbol}"
        for output, growths in measured.growths.items()
        for axis, (symbol, _) in growths.items()
    ]
    return f" ({', '.join(told)})" if told else ""


def _advice(
    signature: Signature,
    measured: Measured,
    sizes: SizeProbe,
    changed: Changed,
    refused: Comparisons,
    run: Run,
    rounding: float,
) -> str:
    """What to write instead: values that do not change answers, if changing one value is enough."""
    trials = Trials(run, ADVICE_S)
    for symbol, value in _other_values(signature, refused.rules, changed.case.padded):
        rules = {**refused.rules, symbol: replace(refused.rules[symbol], value=value)}
        again = Comparisons(signature, rules, measured, sizes, trials, rounding=rounding)
        if again.compare(changed.case) is None and (again.first_change() is None):
            shown = ", ".join(f"{toml_key(name)} = {number:g}" for name, number in value.items())
            where = f"[pad.{toml_key(symbol)}]"
            return f"expected value = {{ {shown} }} in {where}, under which they do not"
        if not trials.within(1.0):
            break
    which = " and ".join(f"[pad.{toml_key(symbol)}]" for symbol in changed.case.padded)
    return (
        f"expected no {which}, or a value in the padding that the model does not look at, as in a "
        "mask that says what is not there"
    )


def _other_values(
    signature: Signature, rules: Mapping[str, PadRule], symbols: Sequence[str]
) -> Iterator[tuple[str, dict[str, float]]]:
    """For each of `symbols`, tables that differ from its rule in one input, then in more."""
    for symbol in symbols:
        rule = rules[symbol]
        dtypes = {
            spec.name: DTYPES[spec.dtype]
            for spec in signature.inputs
            if not is_text(spec.dtype) and symbol in dict(padded_dims(spec, rules)).values()
        }
        given = {name: rule.value_in(name) for name in dtypes}
        others = {name: _candidates(dtype) for name, dtype in dtypes.items()}
        for name, values in others.items():
            yield from (
                (symbol, {**given, name: value}) for value in values if value != given[name]
            )
        yield symbol, dict.fromkeys(given, 0)
        yield symbol, {name: values[-1] for name, values in others.items()}


def _candidates(dtype: np.dtype[np.generic]) -> tuple[float, ...]:
    if dtype.kind == "f":
        return 0.0, -1e9 if dtype.itemsize > 2 else -6e4
    return 0, 1
