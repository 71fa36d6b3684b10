"""The models that are run, laid out as a repository."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from inferq.workers.demo.models import MODELS, prepare

RESNET = "resnet50"
#: The same weights, for the torch engine.
RESNET_PT2 = "resnet50-torch"
BUCKETS = (1, 8, 32)


def lay_out(root: Path) -> dict[str, str]:
    """Make the repository `root`; returns what was left out, and why."""
    prepare(root)
    left_out: dict[str, str] = {}
    if find_spec("torch") is None:
        left_out[RESNET] = "torch is not installed"
    else:
        _export(root / RESNET / "1" / "model.onnx", root / RESNET_PT2 / "1" / "model.pt2")
        (root / RESNET_PT2 / "model.toml").write_text(
            f'engine = "torch"\nmax_batch_size = {BUCKETS[-1]}\nbuckets = {list(BUCKETS)}\n'
        )
    for name in (*MODELS, RESNET):
        folder = root / name
        if folder.is_dir():
            toml = folder / "model.toml"
            labels = toml.read_text() if toml.exists() else ""
            toml.write_text(
                f'engine = "tensorrt"\nmax_batch_size = {BUCKETS[-1]}\n'
                f"buckets = {list(BUCKETS)}\n" + labels
            )
    return left_out


def _export(path: Path, pt2: Path) -> None:
    """A ResNet-50 (He et al. 2015, 25.6 million weights) of random weights."""
    import torch  # noqa: PLC0415

    torch.manual_seed(0)
    for each in (path, pt2):
        each.parent.mkdir(parents=True)
    model = _resnet50()

    class Named(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, image: Any) -> dict[str, Any]:
            return {"scores": self.model(image)}

    batch = torch.export.Dim("batch")
    program = torch.export.export(
        Named().eval(), (torch.zeros(2, 3, 224, 224),), dynamic_shapes={"image": {0: batch}}
    )
    torch.export.save(program, pt2)
    torch.onnx.export(
        model,
        (torch.zeros(2, 3, 224, 224),),
        path,
        dynamo=False,
        input_names=["image"],
        output_names=["scores"],
        dynamic_axes={"image": {0: "batch"}, "scores": {0: "batch"}},
    )


def _resnet50() -> Any:
    import torch  # noqa: PLC0415

    nn = torch.nn

    class Bottleneck(nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self, channels: int, width: int, stride: int) -> None:
            super().__init__()
            out = 4 * width
            self.path = nn.Sequential(
                nn.Conv2d(channels, width, 1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.Conv2d(width, width, 3, stride, 1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.Conv2d(width, out, 1, bias=False),
                nn.BatchNorm2d(out),
            )
            self.short = nn.Identity()
            if stride != 1 or channels != out:
                self.short = nn.Sequential(
                    nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out)
                )

        def forward(self, x: Any) -> Any:
            return torch.relu(self.path(x) + self.short(x))

    layers: list[Any] = [
        nn.Conv2d(3, 64, 7, 2, 3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
    ]
    channels = 64
    for stage, (width, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3))):
        for block in range(blocks):
            layers.append(Bottleneck(channels, width, 2 if stage and not block else 1))
            channels = 4 * width
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000)]
    return nn.Sequential(*layers).eval()
