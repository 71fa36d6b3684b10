"""The results of a model that pads, to settle requests with."""

from __future__ import annotations

from inferq.shared.names import Names
from inferq.shared.schema import Signature, TensorSpec
from inferq.workers.batching.growth import Grid, Growth
from inferq.workers.batching.padding import Measured, Padding, PadRule
from inferq.workers.data_plane.results import Results

NAMES = Names()
I = "incarnation"  # noqa: E741 - as in the names of its keys
SPEC = TensorSpec("y", "float32", ("batch", "n"))
GROWTHS = {"y": {1: ("n", Growth(Grid(), 1, (1,)))}}
PADDING = Padding(Signature((SPEC,), (SPEC,)), {"n": PadRule((4,), 0.0)}, Measured(growths=GROWTHS))
RESULTS = Results("worker@host", "fake", 3, PADDING)
