"""ONNX files whose rows depend on each other in one way each, and such as look as if they did."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import onnx
import onnx.parser

_HEAD: Final = '<ir_version: 8, opset_import: ["" : 17]>'
_SAME: Final = "g (float[batch, 4] x) => (float[batch, 4] y)"
_AXIS: Final = "int64[1] rows = {0}"

#: Outputs that have another number of rows than the inputs, for some inputs at least.
UNTOLD: Final[Mapping[str, str]] = {
    "peaks": """g (float[batch, n] x) => (int64[k, 2] where) <int64[1] last = {1}> {
        top = ReduceMax<axes=[1], keepdims=1>(x)  hit = Equal(x, top)  found = NonZero(hit)
        where = Transpose<perm=[1, 0]>(found) }""",
    "kept": """g (float[batch, 4] x) => (float[k, 4] y) <float least = {0.05}> {
        top = ReduceMax<axes=[1], keepdims=0>(x)  good = Greater(top, least)
        y = Compress<axis=0>(x, good) }""",
    "kept unless large": """g (float[batch, 4] x) => (float[batch, 4] y) <float most = {100.0}> {
        top = ReduceMax<axes=[1], keepdims=0>(x)  good = Less(top, most)
        y = Compress<axis=0>(x, good) }""",
    "kept unless negative": """g (float[batch, 4] x) => (float[batch, 4] y) <float low = {-20.0}> {
        least = ReduceMin<axes=[1], keepdims=0>(x)  good = Greater(least, low)
        y = Compress<axis=0>(x, good) }""",
    "each only once": f"""{_SAME} {{ y = Unique<axis=0, sorted=0>(x) }}""",
    "non-zero": """g (float[batch, n] x) => (int64[two, k] where, float[k] y) <float h = {0.5}> {
        hit = Greater(x, h)  where = NonZero(hit)  t = Transpose<perm=[1, 0]>(where)
        y = GatherND(x, t) }""",
    "suppressed boxes": """g (float[batch, n, 4] boxes, float[batch, c, n] scores)
        => (int64[k, 3] chosen) <int64 most = {20}, float iou = {0.5}, float least = {0.3}> {
        chosen = NonMaxSuppression(boxes, scores, most, iou, least) }""",
    "pairs": """g (float[batch, 4] x) => (float[pairs, 4] y) { y = Concat<axis=0>(x, x) }""",
}

#: Outputs of as many rows as the inputs, whose values depend on the others.
MIXED: Final[Mapping[str, str]] = {
    "a twentieth of the mean": f"""{_SAME} <float a = {{0.05}}> {{
        m = ReduceMean<axes=[0], keepdims=1>(x)  s = Mul(m, a)  y = Add(x, s) }}""",
    "a ten-thousandth of the mean": f"""{_SAME} <float a = {{0.0001}}> {{
        m = ReduceMean<axes=[0], keepdims=1>(x)  s = Mul(m, a)  y = Add(x, s) }}""",
    "the mean in float16": """g (float16[batch, 4] x) => (float16[batch, 4] y) {
        w = Cast<to=1>(x)  m = ReduceMean<axes=[0], keepdims=1>(w)  s = Add(w, m)
        y = Cast<to=10>(s) }""",
    "the mean in float64": """g (double[batch, 4] x) => (double[batch, 4] y) {
        m = ReduceMean<axes=[0], keepdims=1>(x)  y = Add(x, m) }""",
    "sorted": f"""{_SAME} <int64[1] zero = {{0}}> {{
        shape = Shape(x)  n = Gather<axis=0>(shape, zero)  y, order = TopK<axis=0>(x, n) }}""",
    "reversed": f"""{_SAME} <int64[1] s = {{-1}}, int64[1] e = {{-9999}}, {_AXIS}> {{
        y = Slice(x, s, e, rows, s) }}""",
    "reversed but for the first": f"""{_SAME} <int64[1] z = {{0}}, int64[1] o = {{1}},
        int64[1] s = {{-1}}, {_AXIS}> {{
        first = Slice(x, z, o, rows)  rest = Slice(x, s, z, rows, s)
        y = Concat<axis=0>(first, rest) }}""",
    "a running sum": f"""{_SAME} <int64 rows = {{0}}> {{ y = CumSum(x, rows) }}""",
    "a running sum from the end": f"""{_SAME} <int64 rows = {{0}}> {{
        y = CumSum<reverse=1>(x, rows) }}""",
    "a share of the batch": f"""{_SAME} {{ y = Softmax<axis=0>(x) }}""",
    "normalised by the batch": f"""{_SAME} <float e = {{0.00001}}> {{
        m = ReduceMean<axes=[0], keepdims=1>(x)  d = Sub(x, m)  q = Mul(d, d)
        v = ReduceMean<axes=[0], keepdims=1>(q)  w = Add(v, e)  r = Sqrt(w)  y = Div(d, r) }}""",
    "the first row's": f"""{_SAME} <int64[1] z = {{0}}, int64[1] o = {{1}}, float a = {{0.01}},
        {_AXIS}> {{ first = Slice(x, z, o, rows)  s = Mul(first, a)  y = Add(x, s) }}""",
    "the place in the batch": f"""{_SAME} <int64 rows = {{0}}, float a = {{0.01}}> {{
        d = Sub(x, x)  one = Exp(d)  place = CumSum(one, rows)  s = Mul(place, a)
        y = Add(x, s) }}""",
    "the batch's size": f"""{_SAME} <int64 z = {{0}}, float a = {{0.01}}> {{
        shape = Shape(x)  n = Gather<axis=0>(shape, z)  f = Cast<to=1>(n)  s = Mul(f, a)
        y = Add(x, s) }}""",
    "more than one": f"""{_SAME} <int64 z = {{0}}, int64 one = {{1}}, float a = {{0.05}}> {{
        shape = Shape(x)  n = Gather<axis=0>(shape, z)  many = Greater(n, one)
        f = Cast<to=1>(many)  g = Mul(f, a)  s = Mul(x, g)  y = Add(x, s) }}""",
    "four or more": f"""{_SAME} <int64 z = {{0}}, int64 four = {{4}}> {{
        shape = Shape(x)  n = Gather<axis=0>(shape, z)  many = GreaterOrEqual(n, four)
        m = ReduceMean<axes=[0], keepdims=1>(x)  s = Add(x, m)  y = Where(many, s, x) }}""",
    "nine or more": f"""{_SAME} <int64 z = {{0}}, int64 nine = {{9}}> {{
        shape = Shape(x)  n = Gather<axis=0>(shape, z)  many = GreaterOrEqual(n, nine)
        m = ReduceMean<axes=[0], keepdims=1>(x)  s = Add(x, m)  y = Where(many, s, x) }}""",
    "values beyond 10": f"""{_SAME} <float ten = {{10.0}}, float a = {{0.01}}> {{
        d = Sub(x, ten)  r = Relu(d)  m = ReduceMean<axes=[0], keepdims=1>(r)  s = Mul(m, a)
        y = Add(x, s) }}""",
    "values beyond 200": f"""{_SAME} <float most = {{200.0}}, float a = {{0.01}}> {{
        d = Sub(x, most)  r = Relu(d)  m = ReduceMean<axes=[0], keepdims=1>(r)  s = Mul(m, a)
        y = Add(x, s) }}""",
    "negative values": f"""{_SAME} <float a = {{0.01}}> {{
        n = Neg(x)  r = Relu(n)  m = ReduceMean<axes=[0], keepdims=1>(r)  s = Mul(m, a)
        y = Add(x, s) }}""",
    "the mean behind a mask": f"""{_SAME} <float a = {{0.05}},
        float[4] mask = {{-1000000000.0, 0, -1000000000.0, 0}}> {{
        m = ReduceMean<axes=[0], keepdims=1>(x)  s = Mul(m, a)  t = Add(x, s)  u = Tanh(t)
        y = Add(u, mask) }}""",
    "the mean beside time stamps": f"""{_SAME} <float a = {{0.05}},
        float[4] stamps = {{1700000000.0, 1700000000.0, 1700000000.0, 0}}> {{
        m = ReduceMean<axes=[0], keepdims=1>(x)  s = Mul(m, a)  t = Add(x, s)  u = Sigmoid(t)
        y = Add(u, stamps) }}""",
    "zero rows": f"""{_SAME} <{_AXIS}, int64[1] last = {{1}}, float none = {{0.0}}> {{
        a = Abs(x)  t = ReduceSum<keepdims=1>(a, last)  z = Equal(t, none)  f = Cast<to=1>(z)
        n = ReduceSum<keepdims=1>(f, rows)  y = Add(x, n) }}""",
    "scaled by the largest": """g (float[batch, 4] x) => (float[batch, 4] y) {
        q, scale, zero = DynamicQuantizeLinear(x)  y = DequantizeLinear(q, scale, zero) }""",
    "more than the mean": """g (float[batch, 4] x) => (bool[batch, 4] y) {
        m = ReduceMean<axes=[0], keepdims=1>(x)  y = Greater(x, m) }""",
    "the largest row's place": """g (float[batch, 4] x) => (int64[batch, 4] y) <int64 z = {0}> {
        top = ArgMax<axis=0, keepdims=1>(x)  shape = Shape(x)  y = Expand(top, shape) }""",
    "its rank": """g (float[batch, 4] x) => (int64[batch, 4] y) <int64[1] zero = {0}> {
        shape = Shape(x)  n = Gather<axis=0>(shape, zero)  v, y = TopK<axis=0>(x, n) }""",
    "integers beyond 1": """g (int64[batch, 4] x) => (int64[batch, 4] y) <int64 one = {1}> {
        d = Sub(x, one)  z = Sub(d, d)  r = Max(d, z)  s = ReduceMax<axes=[0], keepdims=1>(r)
        y = Add(x, s) }""",
    "bytes beyond 10": """g (uint8[batch, 4] x) => (float[batch, 4] y) <float ten = {10.0}> {
        f = Cast<to=1>(x)  m = ReduceMax<axes=[0], keepdims=1>(f)  w = Max(m, ten)
        y = Div(f, w) }""",
    "negative integers": """g (int32[batch, 4] x) => (int32[batch, 4] y) <int32 z = {0}> {
        m = ReduceMin<axes=[0], keepdims=1>(x)  w = Min(m, z)  y = Add(x, w) }""",
    "indices beyond 3 of 8": """g (int64[batch] x) => (float[batch, 2] y)
        <float[8, 2] table = {0,0,0,0,0,0,0,0,1,2,3,4,5,6,7,8}> {
        v = Gather<axis=0>(table, x)  m = ReduceMean<axes=[0], keepdims=1>(v)  y = Add(v, m) }""",
    "strings reversed": f"""g (string[batch, 2] x) => (string[batch, 2] y)
        <int64[1] s = {{-1}}, int64[1] e = {{-9999}}, {_AXIS}> {{
        y = Slice(x, s, e, rows, s) }}""",
    "the mean of numbers in strings": """g (string[batch] x) => (float[batch] y) {
        n = Cast<to=1>(x)  m = ReduceMean<axes=[0], keepdims=1>(n)  y = Add(n, m) }""",
    "one of two inputs": """g (float[batch, 4] x, int64[batch] kind) => (float[batch, 4] y)
        <float[9] table = {0,0,0,0,1,0,0,2,0}, int64[2] tail = {-1, 1}> {
        v = Gather<axis=0>(table, kind)  m = ReduceMax<axes=[0], keepdims=1>(v)  y = Add(x, m) }""",
    "one of two outputs": """g (float[batch, 4] x) => (float[batch, 4] y, float[batch, 4] z) {
        y = Relu(x)  m = ReduceMean<axes=[0], keepdims=1>(x)  z = Sub(x, m) }""",
}

#: Rows that do not depend on each other.
INDEPENDENT: Final[Mapping[str, str]] = {
    "strings": "g (string[batch, 2] x) => (string[batch, 2] y) { y = Identity(x) }",
    "numbers in strings": "g (string[batch] x) => (float[batch] y) { y = Cast<to=1>(x) }",
    "doubled": f"{_SAME} {{ y = Add(x, x) }}",
    "largest of its own": """g (float[batch, 4] x) => (int64[batch] y) {
        y = ArgMax<axis=1, keepdims=0>(x) }""",
    "a flag of its own": """g (float[batch, 4] x) => (bool[batch, 4] y) <float h = {0.3}> {
        y = Greater(x, h) }""",
    "sorted within": f"""{_SAME} <int64[1] n = {{4}}> {{ y, order = TopK<axis=1>(x, n) }}""",
    "not a number": f"{_SAME} {{ y = Log(x) }}",
    "always the same": f"{_SAME} {{ y = Sub(x, x) }}",
    "saturated": f"""{_SAME} <float a = {{-50.0}}> {{ s = Mul(x, a)  y = Sigmoid(s) }}""",
    "indices of 8": """g (int64[batch] x) => (float[batch, 2] y)
        <float[8, 2] table = {0,0,0,0,0,0,0,0,1,2,3,4,5,6,7,8}> {
        y = Gather<axis=0>(table, x) }""",
    "behind a mask": f"""{_SAME} <float[4] mask = {{-1000000000.0, 0, -1000000000.0, 0}}> {{
        u = Tanh(x)  y = Add(u, mask) }}""",
    "half": """g (float16[batch, 4] x) => (float16[batch, 4] y) { y = Softmax<axis=1>(x) }""",
    "quantised beforehand": f"""{_SAME} <float s = {{0.05}}, int8 z = {{3}}> {{
        q = QuantizeLinear(x, s, z)  d = DequantizeLinear(q, s, z)  r = Relu(d)
        p = QuantizeLinear(r, s, z)  y = DequantizeLinear(p, s, z) }}""",
    "bytes": """g (uint8[batch, 4] x) => (float[batch, 4] y) <float most = {255.0}> {
        f = Cast<to=1>(x)  y = Div(f, most) }""",
}

#: Doubles until a value is large, which those that are zero or negative never are.
ENDLESS: Final = f"""{_SAME} <float two = {{2.0}}, float large = {{100.0}}, bool go = {{1}}> {{
    y = Loop("", go, x) <body = b (int64 i, bool c, float[p, q] s) => (bool more, float[p, q] t) {{
        t = Mul(s, two)  m = ReduceMax<keepdims=0>(t)  more = Less(m, large) }}> }}"""


def write(path: Path, text: str) -> Path:
    """The model of `text`, in ONNX' own notation, as a file at `path`, whose folders are made."""
    model = onnx.parser.parse_model(_HEAD + text)
    onnx.checker.check_model(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.SerializeToString())
    return path
