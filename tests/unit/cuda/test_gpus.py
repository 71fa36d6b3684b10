"""The GPUs of a host as its driver tells them. NVML is a fake here, since there is no card."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.gpus import NO_CARD, fake_nvml

from inferq.shared.errors import ConfigError
from inferq.workers.cuda import gpus
from inferq.workers.cuda.gpus import (
    Gpu,
    gpu_at,
    parse_cores,
    select,
    visible_as,
    visible_indices,
)

INSTEAD = "`inferq worker --cpu` serves on the CPU"


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Any:
    return fake_nvml(monkeypatch)


@pytest.fixture
def near(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the kernel tells the cores near GPU 0."""
    monkeypatch.setattr(gpus, "PCI_DEVICES", tmp_path)
    folder = tmp_path / "0000:3b:00.0"
    folder.mkdir()
    return folder / "local_cpulist"


def test_a_gpu_is_told_with_the_cores_near_it(nvml: Any, near: Path) -> None:
    near.write_text("0-3,8\n")
    assert gpu_at(0) == Gpu(
        index=0,
        uuid="GPU-00000000-0000-0000-0000-000000000000",
        name="No Card 0",
        pci_bus_id="0000:3b:00.0",
        memory_bytes=80 << 30,
        compute_capability=(9, 0),
        cores=frozenset({0, 1, 2, 3, 8}),
    )
    assert nvml.OPEN == 0, "what was initialised is shut down"


@pytest.mark.parametrize("text", [None, "", "\n", "many"])
def test_where_the_kernel_does_not_tell_no_cores_are_near(
    nvml: Any, near: Path, text: str | None
) -> None:
    if text is not None:
        near.write_text(text)
    assert gpu_at(0).cores == frozenset()


@pytest.mark.parametrize(
    ("text", "cores"), [("5\n", {5}), ("0-1,4-5", {0, 1, 4, 5}), ("0-0", {0}), ("", set())]
)
def test_the_kernels_list_of_cores(text: str, cores: set[int]) -> None:
    assert parse_cores(text) == cores


@pytest.mark.parametrize(
    ("given", "indices"), [("0", [0]), ("1, 0", [1, 0]), ("all", [0, 1]), ("1", [1])]
)
def test_what_the_option_selects(nvml: Any, given: str, indices: list[int]) -> None:
    assert [gpu.index for gpu in select(given)] == indices


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("2", f"gpu is 2; expected 0 to 1 on this host; {INSTEAD}"),
        ("0,0", "gpu is '0,0'; expected each GPU once: one worker process serves it"),
        ("-1", "gpu is '-1'; expected a GPU's number, several with commas (0,1), or all"),
        ("first", "gpu is 'first'; expected a GPU's number, several with commas (0,1), or all"),
        ("", "gpu is ''; expected a GPU's number, several with commas (0,1), or all"),
        (
            "9" * 5000,
            f"gpu is '{'9' * 5000}'; expected a GPU's number, several with commas (0,1), or all",
        ),
        ("²", "gpu is '²'; expected a GPU's number, several with commas (0,1), or all"),
    ],
)
def test_what_it_cannot_select(nvml: Any, given: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        select(given)
    assert caught.value.message == expected


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(ConfigError) as caught:
        gpu_at(0)
    assert caught.value.message == (
        "no GPU can be used: the package nvidia-ml-py is not installed; expected: "
        f'pip install "inferq[tensorrt]"; {INSTEAD}'
    )


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ("NVMLError_LibraryNotFound", "no NVIDIA driver is found (libnvidia-ml.so.1); install it"),
        ("NVMLError_DriverNotLoaded", "the NVIDIA driver is not loaded; load it"),
        ("NVMLError_NoPermission", "this process may not talk to the NVIDIA driver; let its user"),
        ("NVMLError", "the NVIDIA driver does not answer (why); see what nvidia-smi says"),
    ],
)
def test_without_a_driver_one_line_says_so_and_what_to_do(
    nvml: Any, monkeypatch: pytest.MonkeyPatch, error: str, said: str
) -> None:
    monkeypatch.setattr(nvml, "BROKEN", getattr(nvml, error)("why"))
    with pytest.raises(ConfigError) as caught:
        select("all")
    message = caught.value.message
    assert message.startswith(f"no GPU can be used: {said}")
    assert message.endswith(f"; {INSTEAD}")
    assert "\n" not in message


def test_a_driver_without_a_card(nvml: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml, "CARDS", [])
    for ask in (lambda: gpu_at(0), lambda: select("all")):
        with pytest.raises(ConfigError, match="the NVIDIA driver finds none") as caught:
            ask()
        assert caught.value.message.endswith(INSTEAD)


def test_a_card_that_does_not_answer_is_named_and_the_others_serve(nvml: Any) -> None:
    nvml.CARDS[1].silent.add("nvmlDeviceGetHandleByIndex")
    assert select("0")[0].index == 0
    with pytest.raises(ConfigError, match=r"^GPU 1 does not answer \(Not Supported\);"):
        select("all")
    assert nvml.OPEN == 0


def test_a_card_may_keep_the_size_of_its_memory_to_itself(nvml: Any) -> None:
    nvml.CARDS[0].silent.add("nvmlDeviceGetMemoryInfo")
    assert gpu_at(0).memory_bytes is None


def test_all_are_those_that_cuda_may_see(nvml: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for visible, left in (("1", [1]), ("GPU-00000000,1", [0, 1]), ("GPU-00000001", [1])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert [gpu.index for gpu in select("all")] == left
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES is '', which leaves no GPU"):
        select("all")


@pytest.mark.parametrize(
    ("given", "left"),
    [
        ("0,2,-1,1", {0, 2}),  # the programming guide's own example
        ("", set()),
        ("-1", set()),
        ("NoDevFiles", set()),
        ("3,0", set()),
        ("0,,1", {0}),
        (" 1 , 0", {0, 1}),
        ("GPU-aa01,2", {0, 2}),
        ("GPU-aa,2", set()),  # of two
        ("2,GPU-cc,0", {2}),  # of none
        ("GPU-bb,1", {1, 2}),
        ("²,1", set()),
        ("9" * 5000, set()),
        ("1,MIG-7", {0, 1, 2}),
        ("7,MIG-7", set()),
    ],
)
def test_an_invalid_entry_ends_the_list_of_visible_devices(given: str, left: set[int]) -> None:
    assert visible_indices(given, ["GPU-aa01", "GPU-aa02", "GPU-bb"]) == left


def test_what_stands_behind_an_invalid_entry_is_not_visible(
    nvml: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,2,1")
    assert [gpu.index for gpu in select("all")] == [0]
    with pytest.raises(ConfigError, match="is '0,2,1', which leaves out GPU 1"):
        visible_as(gpu_at(1))
    nvml.CARDS[1].silent.add("nvmlDeviceGetHandleByIndex")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    assert select("0")[0].index == 0, "a card that does not answer has its number"
    assert nvml.OPEN == 0


def test_a_gpu_that_cuda_may_not_see_is_refused(nvml: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    with pytest.raises(ConfigError, match="is '1', which leaves out GPU 0; expected it unset or "):
        select("0")


def test_a_mig_device_that_is_named_already_is_left_alone(
    nvml: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = gpu_at(0)
    assert visible_as(gpu) == gpu.uuid
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-7")
    assert visible_as(gpu) == "MIG-7"


# --- MIG: a card that is divided into devices of their own ---------------------------------------

MIG = "MIG-aa01", "MIG-aa02"


def test_a_card_that_is_divided_answers_though_its_own_memory_may_not_be_asked(nvml: Any) -> None:
    nvml.divide(nvml.CARDS[0], *MIG)
    gpu = gpu_at(0)
    assert gpu.memory_bytes is None
    assert gpu.mig == MIG
    assert gpu_at(1).mig is None
    assert [each.index for each in select("all")] == [0, 1]


def test_what_may_not_be_asked_is_not_called_silent(nvml: Any) -> None:
    nvml.CARDS[1].forbidden.add("nvmlDeviceGetName")
    with pytest.raises(ConfigError) as caught:
        gpu_at(1)
    assert caught.value.message == (
        "GPU 1 may not be asked (Insufficient Permissions); expected a user or a container that "
        f"was given it; {INSTEAD}"
    )


def test_a_process_is_pinned_to_a_device_of_a_card_that_is_divided(nvml: Any) -> None:
    """CUDA cannot use such a card as a whole, and shows a process no more than one part."""
    nvml.divide(nvml.CARDS[0], *MIG)
    assert visible_as(gpu_at(0)) == "MIG-aa01"
    assert visible_as(gpu_at(1)) == gpu_at(1).uuid


@pytest.mark.parametrize(
    ("given", "pinned"),
    [
        ("MIG-aa02", "MIG-aa02"),
        ("MIG-aa02,MIG-aa01", "MIG-aa02"),
        ("MIG-bb01,MIG-aa01", "MIG-aa01"),  # of another card, and of this one
        ("MIG-aa", "MIG-aa01"),
        ("0", "MIG-aa01"),
        ("GPU-00000000", "MIG-aa01"),
        ("MIG-GPU-00000000-0000-0000-0000-000000000000/1/0", None),  # drivers before R470
        ("MIG-unknown", None),
    ],
)
def test_of_the_devices_that_are_named_it_gets_the_first_of_its_card(
    nvml: Any, monkeypatch: pytest.MonkeyPatch, given: str, pinned: str | None
) -> None:
    nvml.divide(nvml.CARDS[0], *MIG)
    nvml.divide(nvml.CARDS[1], "MIG-bb01")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert visible_as(gpu_at(0)) == (pinned or given)


def test_a_device_that_is_named_is_of_one_card(nvml: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a process for each card would serve on it."""
    nvml.divide(nvml.CARDS[1], "MIG-bb01")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-bb01")
    assert [gpu.index for gpu in select("all")] == [1]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-GPU-00000001-0000-0000-0000-000000000000/3/0")
    assert [gpu.index for gpu in select("all")] == [1]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-bb01")
    with pytest.raises(ConfigError, match="is 'MIG-bb01', which leaves out GPU 0"):
        select("0")


def test_a_card_in_mig_mode_without_a_device_is_refused(nvml: Any) -> None:
    nvml.divide(nvml.CARDS[0])
    with pytest.raises(ConfigError) as caught:
        visible_as(gpu_at(0))
    assert caught.value.message == (
        "GPU 0 is in MIG mode and has no MIG device here; expected one (`nvidia-smi mig -cgi … -C`,"
        f" or a container that was given one); {INSTEAD}"
    )


@pytest.mark.parametrize("error", ["silent", "forbidden"])
def test_a_card_that_does_not_tell_its_mode_is_not_divided(nvml: Any, error: str) -> None:
    getattr(nvml.CARDS[0], error).add("nvmlDeviceGetMigMode")
    assert gpu_at(0).mig is None


def test_the_fake_answers_what_the_real_one_would(
    nvml: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its names are nvidia-ml-py's, and its numbers too."""
    spec = importlib.machinery.PathFinder.find_spec(
        "pynvml", [entry for entry in sys.path if entry != str(NO_CARD)]
    )
    if spec is None or spec.loader is None:
        pytest.skip("nvidia-ml-py is not installed")
    real = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "pynvml", real)  # it looks for itself there
    spec.loader.exec_module(real)
    for name in [name for name in dir(nvml) if name.startswith(("nvml", "NVML"))]:
        found = getattr(real, name)
        if isinstance(found, int):
            assert getattr(nvml, name) == found, name
        else:
            assert callable(found), name
