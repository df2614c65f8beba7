"""Training, judging and attacking on a device that is not the CPU: tests/on_other_devices.py in its own process."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_what_is_promised_of_models_on_other_devices():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "", "tests/on_other_devices.py"]
    run = subprocess.run(
        command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=500, check=False
    )
    assert run.returncode == 0, run.stdout[-6000:]
