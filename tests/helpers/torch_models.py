"""Tiny programs of torch.export for tests, each with one property that matters for serving.

Importing this needs PyTorch: call ``pytest.importorskip("torch")`` before.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from inferq.shared.schema import Array

#: Rows of the example that a program is exported with.
ROWS = 2


def save(
    path: Path,
    module: Any,
    args: tuple[Any, ...],
    dynamic_shapes: Any = None,
    kwargs: Mapping[str, Any] | None = None,
) -> Path:
    """Export `module` to `path`, whose folders are made."""
    program = torch.export.export(module, args, dict(kwargs or {}), dynamic_shapes=dynamic_shapes)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.export.save(program, path)
    return path


def batch(**limits: int) -> dict[int, Any]:
    """Dim 0 of variable size, called so."""
    return {0: torch.export.Dim("batch", **limits)}


class Double(torch.nn.Module):
    """x → x + x."""

    def forward(self, x: Any) -> Any:
        return {"y": x + x}


class TwoInputs(torch.nn.Module):
    """a, b → doubled a, doubled b."""

    def forward(self, a: Any, b: Any) -> Any:
        return a + a, b + b


class Pooled(torch.nn.Module):
    """x: [batch, seq, 4] → y doubled, and its sum along seq."""

    def forward(self, x: Any) -> Any:
        return {"y": x + x, "sum": x.sum(1)}


class Total(torch.nn.Module):
    """x → one row, the sum of all."""

    def forward(self, x: Any) -> Any:
        return x.sum(0, keepdim=True)


class MixedRows(torch.nn.Module):
    """x → softmax over the batch: as many rows, but none independent."""

    def forward(self, x: Any) -> Any:
        return x.softmax(0)


class Lookup(torch.nn.Module):
    """ids → rows of a table of 4; other ids are an error."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.arange(8.0).reshape(4, 2))

    def forward(self, ids: Any) -> Any:
        return {"y": self.table[ids]}


class InPlace(torch.nn.Module):
    """Doubles its input where it stands, through a view of it."""

    def forward(self, x: Any) -> Any:
        x[:, :2].mul_(2)
        return {"y": x + 0}


class Counter(torch.nn.Module):
    """Counts its runs."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("runs", torch.zeros(1))

    def forward(self, x: Any) -> Any:
        self.runs.add_(1)
        return x + self.runs


class Nested(torch.nn.Module):
    """Takes a dict, a constant and a keyword; answers a tuple in a dict."""

    def forward(self, pair: Any, add: bool, *, scale: Any) -> Any:
        total = pair["left"] + pair["right"] if add else pair["left"]
        return {"all": (total * scale, pair["right"]), "scale": scale + 0}


class Square(torch.nn.Module):
    """x → x @ x: one operator that takes its time."""

    def forward(self, x: Any) -> Any:
        return {"y": x @ x}


class Half(torch.nn.Module):
    """Answers in bfloat16."""

    def forward(self, x: Any) -> Any:
        return x.to(torch.bfloat16)


class WithSize(torch.nn.Module):
    """Answers a number beside a tensor."""

    def forward(self, x: Any) -> Any:
        return x + 1, 7


class Digits(torch.nn.Module):
    """image: [batch, 1, 8, 8] of 0 … 16 → the 10 digits' logits and the most likely digit."""

    def __init__(self) -> None:
        super().__init__()
        self.features = torch.nn.Sequential(
            torch.nn.Conv2d(1, 16, 3, padding=1),
            torch.nn.BatchNorm2d(16),
            torch.nn.ReLU(),
            torch.nn.MaxPool2d(2),
            torch.nn.Conv2d(16, 32, 3, padding=1),
            torch.nn.ReLU(),
            torch.nn.Flatten(),
        )
        self.head = torch.nn.Linear(512, 10)

    def forward(self, image: Any) -> Any:
        logits = self.head(self.features(image / 16))
        return {"logits": logits, "digit": logits.argmax(1)}


def double(path: Path, *, fixed: bool = False, **limits: int) -> Path:
    """`Double` of float32[batch, 3]."""
    shapes = None if fixed else {"x": batch(**limits)}
    return save(path, Double(), (torch.ones(1 if fixed else ROWS, 3),), shapes)


def lookup(path: Path) -> Path:
    """`Lookup` of int64[batch]."""
    return save(path, Lookup(), (torch.tensor([0, 1]),), {"ids": batch()})


def pooled(path: Path) -> Path:
    """`Pooled`, of which seq varies, too."""
    seq = torch.export.Dim("seq")
    return save(path, Pooled(), (torch.ones(ROWS, 3, 4),), {"x": {**batch(), 1: seq}})


def digits(path: Path, images: Array, labels: Array, epochs: int = 6) -> Path:
    """`Digits`, trained on `images` and their `labels` for a second or so."""
    torch.manual_seed(0)
    model = Digits()
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    x, y = torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64))
    for _ in range(epochs):
        for chosen in torch.randperm(len(x)).split(128):
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(model(x[chosen])["logits"], y[chosen]).backward()
            optimiser.step()
    return save(path, model.eval(), (x[:ROWS],), {"image": batch()})
