"""What README.md and the tutorial print runs as it is copied, block after block."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import pytest
from helpers import pages
from helpers.pages import Block
from helpers.worker import Worker

#: A Redis is started by the pages themselves.
REDIS, FLOWER = "6379", "5555"
TIMEOUT_S = 150.0
#: Waits until Flower shows the model, as who opens the page in a browser would.
SHOWN = """\
import json, time, urllib.request
by = time.monotonic() + 60
while True:
    try:
        with urllib.request.urlopen("http://127.0.0.1:5555/inference/data", timeout=5) as answer:
            told = answer.read().decode()
        if "MODEL" in told:
            break
    except OSError:
        told = ""
    assert time.monotonic() < by, told
    time.sleep(0.2)
print("shown in Flower")
"""


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def _outcome(page: Path, model: str, tmp_path: Path) -> str:
    """What the blocks of `page` print. Only the environment and the ports are others."""
    blocks = pages.blocks(page)
    installs = [block for block in blocks if "pip install" in block.text]
    assert installs == blocks[:1]
    assert re.search(r"\$\(|`|sudo", installs[0].text) is None
    shells = [block.as_shell for block in blocks[1:]]
    (flower,) = [n for n, text in enumerate(shells) if "inferq flower" in text]
    shells.insert(flower + 1, Block("python", SHOWN.replace("MODEL", model)).as_shell)
    script = "\n".join(shells) + "wait\necho all has ended\n"
    for port in (REDIS, FLOWER):
        script = script.replace(port, _free_port())
    folder = pages.clone(tmp_path / "inferq")
    status, output = pages.run(script, folder, {"PYTHONUNBUFFERED": "1"}, TIMEOUT_S)
    assert status == 0, output
    assert "shown in Flower" in output, output
    assert "handed back what was held: 0 requests" in output, output
    assert output.rstrip().endswith("all has ended"), output
    return output


def test_the_readme_runs_as_it_is_copied(tmp_path: Path) -> None:
    output = _outcome(pages.ROOT / "README.md", "magika", tmp_path)
    assert re.search(r"^markdown$", output, re.MULTILINE), output
    assert "Receipt(queue_ms=" in output, output
    assert "(1, 214)" in output, output
    assert "[1, 214]" in output, output


def test_the_tutorial_runs_as_it_is_copied(tmp_path: Path) -> None:
    output = _outcome(pages.ROOT / "docs" / "tutorial.md", "colours", tmp_path)
    assert "rgb: float32[N, 3]" in output, output
    assert output.count("share: float32[1, 3]") == 2, output
    assert "expected 3 as in rgb" in output, output
    found = re.search(r"([\d,]+) requests/s, ([\d.]+) rows in a batch", output)
    assert found is not None, output
    assert float(found[2]) > 1, output


#: Web frameworks are none of inferq's dependencies.
FRAMEWORKS = ("fastapi", "flask", "django", "shop")


def test_what_is_shown_of_calling_a_model_runs(redis_url: str, tmp_path: Path) -> None:
    tutorial = pages.blocks(pages.ROOT / "docs" / "tutorial.md")
    shown = pages.blocks(pages.ROOT / "docs" / "call.md")
    plain = [
        block.as_shell.replace("redis://127.0.0.1:6379/0", redis_url)
        for block in shown
        if not any(f"{name} import" in block.text for name in FRAMEWORKS)
        and "# shop/" not in block.text
    ]
    assert len(plain) == 4
    plain.append(
        Block(
            "python", _retry(shown) + "print(infer_patiently(Client(), 'colours', INPUTS))\n"
        ).as_shell
    )
    make = next(block for block in tutorial if "onnx.save" in block.text)
    folder = pages.clone(tmp_path / "inferq")
    status, output = pages.run(make.as_shell, folder, {}, TIMEOUT_S)
    assert status == 0, output
    with Worker(redis_url, folder / "my-models"):
        status, output = pages.run(
            "\n".join(plain), folder, {"INFERQ_REDIS_URL": redis_url}, TIMEOUT_S
        )
    assert status == 0, output
    assert "Result(outputs={'share'" in output, output


def _retry(shown: list[Block]) -> str:
    (retry,) = [block.text for block in shown if "def infer_patiently" in block.text]
    return f"{retry}\nINPUTS = {{'rgb': [[0.9, 0.1, 0.3]]}}\n"


@pytest.mark.parametrize("page", ["README.md", "docs/tutorial.md"])
def test_a_page_that_is_copied_says_at_the_first_block_how_to_install(page: str) -> None:
    first = pages.blocks(pages.ROOT / page)[0]
    assert first.language == "sh"
    lines = first.text.splitlines()
    assert lines[0].startswith("python3 -m venv .venv")
    assert lines[1].startswith('pip install -c constraints.txt -e ".[')
    assert len(lines) == 2
