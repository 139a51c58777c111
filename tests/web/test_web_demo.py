"""The command line that serves the page: options, start-up, errors in one line."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import web_demo
from tests.web.conftest import REPOSITORY


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the variables that the server sets back to what they were."""
    for variable in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED"):
        monkeypatch.setenv(variable, "")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--auth", "ada"], "--auth: "),
        (["--config", "v1.yaml"], "--config without --checkpoint"),
        (["--max-seconds", "0"], "limits: "),
        (["--max-seconds", "inf"], "limits: "),
        (["--keep-minutes", "60"], "--keep-minutes: got 60, .* 85 minutes"),
        (["--port", "70000"], "--port: got 70000"),
        (["--port", "-1"], "--port: got -1"),
    ],
)
def test_wrong_options(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    import re

    with pytest.raises(SystemExit) as stop:
        web_demo.main(argv)
    assert stop.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom scripts import web_demo\n"
        "try: web_demo.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print({'torch', 'PIL', 'gradio'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


def test_a_missing_gradio_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "ldm.web.page", raising=False)
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert web_demo.main([]) == 2
    assert "pip install" in capsys.readouterr().err


def test_a_taken_port_is_one_line(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gradio", reason="the extra demo is not installed")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert web_demo.main(["--checkpoint", str(tiny_folder), "--device", "cpu", "--port", str(port)]) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "error:" in line)  # beside the loading bar
    assert line.startswith(f"error: 127.0.0.1:{port}: ")
    assert not Path(os.environ["GRADIO_TEMP_DIR"]).exists()
