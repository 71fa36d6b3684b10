"""The models that are run, laid out as a repository."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import numpy as np

from gpu.checks import picture
from inferq.workers.demo.models import MODELS, prepare

RESNET = "resnet50"
#: The same weights, for the torch engine, by precision.
RESNET_PT2: Final = {"fp32": "resnet50-torch", "fp16": "resnet50-torch-fp16"}
BUCKETS = (1, 8, 32)
SIDE: Final = 224
#: Of ImageNet.
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
#: What a block adds to what it is given, as trained networks' do: of more, rounding is all that is
#: left at the end.
_BRANCH: Final = 0.1
#: Pictures by which the weights are scaled.
_PICTURES: Final = 24


def lay_out(root: Path, *, resnet: bool) -> dict[str, str]:
    """Make the repository `root`; returns what was left out, and why."""
    prepare(root)
    left_out: dict[str, str] = {}
    if not resnet:
        left_out[RESNET] = "it was not asked for"
    elif find_spec("torch") is None:
        left_out[RESNET] = "torch is not installed"
    else:
        _export(root)
        for name in RESNET_PT2.values():
            (root / name / "model.toml").write_text(
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


def _export(root: Path) -> None:
    """`served_resnet50` as an ONNX file, and as programs of both precisions."""
    import torch  # noqa: PLC0415

    example = torch.zeros(2, SIDE, SIDE, 3, dtype=torch.uint8)
    path = root / RESNET / "1" / "model.onnx"
    path.parent.mkdir(parents=True)
    model = served_resnet50()
    torch.onnx.export(
        model,
        (example,),
        path,
        dynamo=False,
        input_names=["image"],
        output_names=["scores"],
        dynamic_axes={"image": {0: "batch"}, "scores": {0: "batch"}},
    )
    for precision, name in RESNET_PT2.items():
        if precision == "fp16":
            model.half().to(memory_format=torch.channels_last)
        program = torch.export.export(
            model, (example,), dynamic_shapes={"image": {0: torch.export.Dim("batch")}}
        )
        (root / name / "1").mkdir(parents=True)
        torch.export.save(program, root / name / "1" / "model.pt2")


def served_resnet50() -> Any:
    """A ResNet-50 (He et al. 2015, 25.6 million weights) of random weights, as users send to it.

    image uint8[batch, 224, 224, 3], 150 KB each → scores float32[batch, 1000]. It is scaled by a
    few pictures as training would have done it, so that scores of different ones differ by about
    half of the largest.
    """
    import torch  # noqa: PLC0415

    class Served(torch.nn.Module):  # type: ignore[misc]
        def __init__(self, network: Any) -> None:
            super().__init__()
            self.network = network
            deviation = torch.tensor(_DEVIATION).reshape(3, 1, 1)
            self.register_buffer("scale", 1 / (255 * deviation))
            self.register_buffer("shift", -torch.tensor(_MEAN).reshape(3, 1, 1) / deviation)

        def forward(self, image: Any) -> Any:
            # Transposed while it is still bytes; all that follows has the channels last, then.
            planes = image.permute(0, 3, 1, 2).to(self.scale.dtype)
            return {"scores": self.network(planes * self.scale + self.shift).float()}

    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        network = _resnet50()
        for module in network.modules():
            if isinstance(module, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 1.0  # the next batch's statistics, and no others
            elif hasattr(module, "path"):
                torch.nn.init.constant_(module.path[-1].weight, _BRANCH)
        served = Served(network)
        rng = np.random.default_rng(1)
        images = torch.from_numpy(np.stack([picture(rng, SIDE) for _ in range(_PICTURES)]))
        served.train()(images)
        served.eval()
        # What all pictures have in common says nothing of any.
        network[-1].bias -= served(images)["scores"].mean(0)
    return served


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
