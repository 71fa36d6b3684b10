"""A model on its way from its spec to being served: what is told of it, and what is freed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.repository import fake_model
from helpers.served import served_model

from inferq.shared.errors import ConfigError, FatalEngineError
from inferq.shared.schema import Array
from inferq.workers.data_plane import reporting
from inferq.workers.data_plane.loading import LoadingModel
from inferq.workers.engines.fake import FakeEngine
from inferq.workers.models.engine import Batch, Lane, LoadedModel
from inferq.workers.models.repository import load_model


class Broken(Lane):
    """Raises what it was given, whatever it is to run."""

    def __init__(self, problem: Exception) -> None:
        self._problem = problem

    def run(self, batch: Batch) -> Mapping[str, Array]:
        raise self._problem


@pytest.mark.parametrize(
    ("problem", "expected"),
    [(ValueError("no"), ConfigError), (FatalEngineError("sticky"), FatalEngineError)],
)
def test_a_model_that_cannot_be_warmed_up_is_freed_again(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    problem: Exception,
    expected: type[Exception],
) -> None:
    fake_model(tmp_path, "m")
    opened, freed = FakeEngine.load, []

    def load(engine: FakeEngine) -> LoadedModel:
        return replace(opened(engine), lanes=[Broken(problem)], free=lambda: freed.append("m"))

    monkeypatch.setattr(FakeEngine, "load", load)
    with pytest.raises(expected):
        served_model(tmp_path, "m")
    assert freed == ["m"]


def test_a_model_is_freed_when_it_is_closed_and_not_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_model(tmp_path, "m", knobs="warm_up = false")
    opened, freed = FakeEngine.load, []

    def load(engine: FakeEngine) -> LoadedModel:
        return replace(opened(engine), free=lambda: freed.append("m"))

    monkeypatch.setattr(FakeEngine, "load", load)
    model = served_model(tmp_path, "m")
    assert (model.is_driven, freed) == (True, [])
    model.close(10)
    assert (model.is_driven, freed) == (False, ["m"])


def test_what_is_not_loaded_yet_is_reported_as_what_it_will_be_without_lanes(
    tmp_path: Path,
) -> None:
    fake_model(tmp_path, "m", knobs="lanes = 2\nmax_batch_size = 8\nwarm_up = false")
    model = LoadingModel(load_model(tmp_path, "m"))
    before = reporting.stats(model)
    assert (before.model, before.version, before.engine) == ("m", 1, "fake")
    assert (before.lanes, before.max_batch_size, before.target_batch_size) == (0, 8, 8)
    assert (reporting.fill(model), reporting.audits(model)) == ("no batch yet", "none yet")
    served = served_model(tmp_path, "m")
    after = reporting.stats(served)
    served.close(10)
    assert after.lanes == 2
    after.lanes = 0
    assert after == before, "no request has come in between"
