"""What model.py is written with: declarations, answers, and a run without a worker."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from inferq.model import Context, Model, RequestError, run_once
from inferq.model.answers import WrongRows, read_answer
from inferq.model.declared import signature_of
from inferq.shared.errors import ConfigError, EngineError, InvalidInput
from inferq.shared.schema import Signature, TensorSpec

ROWS = 3
INPUTS = {"x": np.zeros((ROWS, 5), np.float32)}
SIGNATURE = Signature(
    (TensorSpec("x", "float32", ("batch", "n")),),
    (TensorSpec("y", "float32", ("batch", 2)), TensorSpec("label", "int64", ("batch",))),
)
Y = np.ones((ROWS, 2), np.float32)
LABEL = np.arange(ROWS)


def declared(inputs: Any, outputs: Any = None, **attributes: Any) -> type[Model]:
    outputs = {"y": "float32[batch]"} if outputs is None else outputs
    attributes.setdefault("run", lambda self, inputs: {})
    return type("Mine", (Model,), {"inputs": inputs, "outputs": outputs, **attributes})


def test_dims_are_sizes_names_and_question_marks() -> None:
    inputs = {"a": "float32[batch, 3, ?]", "b": " uint8 [ batch,n ] ", "c": "bool[]"}
    signature = signature_of(declared(inputs))
    assert signature.inputs == (
        TensorSpec("a", "float32", ("batch", 3, None)),
        TensorSpec("b", "uint8", ("batch", "n")),
        TensorSpec("c", "bool", ()),
    )
    assert signature_of(
        declared({str(s.name): str(s).partition(": ")[2] for s in signature.inputs})
    )


@pytest.mark.parametrize(
    ("inputs", "told"),
    [
        ({"x": "floaty[batch]"}, r"Mine\.inputs\['x'\] is 'floaty\[batch\]'; expected one of the"),
        ({"x": "float32"}, r"expected dtype\[dims\], as in"),
        ({"x": np.float32}, r"expected dtype\[dims\], as in"),
        ({"x": "float32[batch, -1]"}, r"with the dim '-1'; expected a size, a name or \?"),
        ({"x": "float32[batch,]"}, r"with the dim ''; expected"),
        ({"x": f"float32[{', '.join('abcdefghijklmnopq')}]"}, r"expected at most 16 dims"),
        ({3: "float32[batch]"}, r"Mine\.inputs has the key 3; expected a name"),
        ({}, r"Mine\.inputs has 0 entries; expected 1 to"),
        (["x"], r"Mine\.inputs is \['x'\]; expected a dict"),
    ],
)
def test_a_declaration_that_is_wrong_is_refused_by_name(inputs: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        signature_of(declared(inputs))


def test_a_class_without_run_is_refused() -> None:
    with pytest.raises(ConfigError, match="class Mine has no run; expected def run"):
        signature_of(declared({"x": "float32[batch]"}, run=Model.run))


# --- answers -------------------------------------------------------------------------------------


def read(answer: object, rows: int | None = ROWS) -> Any:
    return read_answer(answer, SIGNATURE, INPUTS, rows)


def test_arrays_are_taken_as_they_are() -> None:
    outputs, errors = read({"y": Y, "label": LABEL})
    assert outputs["y"] is Y
    assert errors == {}


def test_an_array_of_the_other_byte_order_keeps_its_values() -> None:
    outputs, _ = read({"y": Y.astype(">f4"), "label": LABEL.astype(">i8")})
    assert outputs["y"].dtype == np.dtype("<f4")
    assert outputs["y"].tolist() == Y.tolist()
    assert outputs["label"].tolist() == LABEL.tolist()


def test_lists_become_the_dtype_where_no_value_changes() -> None:
    outputs, _ = read({"y": [[1, 2.5], [3, 4], [5, 6]], "label": [1, 2, 3]})
    assert outputs["y"].dtype == np.float32
    assert outputs["y"].tolist() == [[1, 2.5], [3, 4], [5, 6]]
    assert outputs["label"].dtype == np.int64


def test_rows_may_be_answered_one_by_one_and_some_by_errors() -> None:
    error = RequestError("no face")
    row = {"y": np.array([1, 2], np.float32), "label": np.int64(7)}
    outputs, errors = read([row, error, {"y": [3.0, 4.0], "label": 8}])
    assert errors == {1: error}
    assert outputs["y"].tolist()[::2] == [[1, 2], [3, 4]]
    assert outputs["label"].tolist()[::2] == [7, 8]
    assert all(len(array) == ROWS for array in outputs.values())


def test_rows_that_all_have_errors_have_no_outputs() -> None:
    outputs, errors = read([RequestError(str(n)) for n in range(ROWS)])
    assert outputs == {}
    assert [errors[n].message for n in range(ROWS)] == ["0", "1", "2"]


def test_an_error_in_place_of_the_whole_answer_is_raised() -> None:
    with pytest.raises(RequestError, match="none of these"):
        read(RequestError("none of these"))


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ({"y": Y}, r"outputs are \['y'\]; expected \['y', 'label'\]"),
        ({"y": Y, "label": LABEL, 3: 4}, r"outputs are \['y', 'label', 3\]; expected"),
        ({"y": Y.astype(float), "label": LABEL}, r"output 'y' is float64; expected float32 \(arr"),
        ({"y": Y, "label": LABEL.astype(np.int32)}, r"output 'label' is int32; expected int64"),
        ({"y": Y, "label": [1.5, 2.5, 3.5]}, r"output 'label' is \[1\.5.*expected int64"),
        ({"y": Y, "label": ["a", "b", "c"]}, r"output 'label' is \['a'.*expected int64"),
        ({"y": [[1e300, 1]] * 3, "label": LABEL}, r"output 'y' holds 1e\+300; expected what float"),
        ({"y": Y, "label": [1, [2], 3]}, r"output 'label' is \[1, \[2\], 3\]; expected an array"),
        ({"y": Y[:, 0], "label": LABEL}, r"output 'y' has the shape \[3\]; expected 2 dims, as in"),
        (
            {"y": Y[:, :1], "label": LABEL},
            r"output 'y' has the shape \[3, 1\]; expected 2 at dim 1",
        ),
        (None, r"run gave back None; expected output name → array, or a list"),
        ([{"y": [1, 2], "label": 3}] * 2 + [4], r"run gave back 4 for row 2; expected"),
        ([{"y": [1, 2], "label": 3}] * 2 + [{"y": 1}], r"outputs of row 2 are \['y'\]; expected"),
        (
            [{"y": [1, 2], "label": 3}] * 2 + [{"y": [1], "label": 3}],
            r"output 'y' has rows of the shapes \[\[1\], \[2\]\]; expected one",
        ),
    ],
)
def test_what_does_not_fit_names_output_what_it_is_and_what_was_expected(
    answer: object, told: str
) -> None:
    with pytest.raises(EngineError, match=told):
        read(answer)


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ({"y": Y[:2], "label": LABEL}, "output 'y' has 2 rows; expected 3, as the inputs"),
        ([{"y": [1, 2], "label": 3}], "a list of 1 entries; expected 3, one for each row"),
    ],
)
def test_wrong_rows_are_told_apart(answer: object, told: str) -> None:
    with pytest.raises(WrongRows, match=told):
        read(answer)


def test_dims_of_one_name_have_one_size() -> None:
    signature = Signature(SIGNATURE.inputs, (TensorSpec("y", "float32", ("batch", "n")),))
    right = {"y": np.zeros((ROWS, 5), np.float32)}
    assert read_answer(right, signature, INPUTS, ROWS)[0] == right
    with pytest.raises(EngineError, match=r"has the shape \[3, 4\]; expected 5 at dim 1"):
        read_answer({"y": np.zeros((ROWS, 4), np.float32)}, signature, INPUTS, ROWS)


def test_a_model_that_is_not_batchable_gives_what_rows_it_likes() -> None:
    signature = Signature(SIGNATURE.inputs, (TensorSpec("y", "float32", ("found", 2)),))
    outputs, _ = read_answer({"y": Y[:1]}, signature, INPUTS, None)
    assert outputs["y"].shape == (1, 2)


# --- without a worker ----------------------------------------------------------------------------


class Halves(Model):
    inputs: ClassVar = {"x": "float32[batch, 2]"}
    outputs: ClassVar = {"y": "float32[batch]"}

    def load(self, context: Context) -> None:
        self.by = context.config.get("by", 2)

    def run(self, inputs: dict[str, Any]) -> Any:
        return [
            RequestError(f"{row[0]} is negative") if row[0] < 0 else {"y": row[0] / self.by}
            for row in inputs["x"]
        ]


def test_a_model_is_run_once_in_a_test_of_its_own() -> None:
    x = np.array([[4, 0], [8, 0]], np.float32)
    assert run_once(Halves, {"x": x})["y"].tolist() == [2, 4]
    assert run_once(Halves, {"x": x}, config={"by": 4})["y"].tolist() == [1, 2]
    loaded = Halves()
    loaded.load(Context(Path()))
    assert run_once(loaded, {"x": x})["y"].tolist() == [2, 4]
    with pytest.raises(RequestError, match=r"-1\.0 is negative"):
        run_once(Halves, {"x": -x / 4})
    with pytest.raises(InvalidInput, match="dtype float64; expected float32"):
        run_once(Halves, {"x": x.astype(float)})


def test_importing_it_asks_for_no_engine_no_celery_and_no_redis() -> None:
    code = (
        "import sys, inferq.model\n"
        "tops = {name.partition('.')[0] for name in sys.modules}\n"
        "print(tops & {'celery', 'kombu', 'redis', 'onnxruntime', 'torch', 'pydantic'})\n"
        "print([m for m in sys.modules if m.startswith('inferq.workers')])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split("\n")[:2] == ["set()", "[]"]
