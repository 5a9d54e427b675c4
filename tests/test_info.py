"""`python -m regfast.info` prints each operation's path and the reason, on any environment."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from regfast import info


@pytest.mark.parametrize(
    "choice,expected",
    [("auto", "reference  "), ("reference", "REGFAST_BACKEND=reference"), ("triton", "error")],
)
def test_the_paths_of_the_cpu(choice, expected):
    environment = {
        **os.environ,
        "REGFAST_BACKEND": choice,
        "TRITON_INTERPRET": "",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        [sys.executable, "-m", "regfast.info"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line for line in done.stdout.splitlines() if line.strip().startswith(info.OPERATIONS)]
    assert len(lines) == len(info.OPERATIONS) and all(expected in line for line in lines), (
        done.stdout
    )
    assert f"torch      {torch.__version__}" in done.stdout


def test_a_reader_may_stop_early():
    """The pipe is closed before the first line, as `head` may close it early."""
    reader, writer = os.pipe()
    os.close(reader)
    # Unbuffered, the first line meets the closed pipe; buffered, the flush at exit does.
    for unbuffered in ("", "1"):
        environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
        command = [sys.executable, "-m", "regfast.info"]
        done = subprocess.run(
            command, env=environment, stdout=writer, stderr=subprocess.PIPE, text=True
        )
        assert (done.returncode, done.stderr) == (0, "")
    os.close(writer)


def test_an_unknown_choice_is_named():
    environment = {**os.environ, "REGFAST_BACKEND": "gpu"}
    done = subprocess.run(
        [sys.executable, "-m", "regfast.info"], env=environment, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert all(word in done.stderr for word in ("REGFAST_BACKEND", "'gpu'", "'triton'")), (
        done.stderr
    )


def test_the_path_agrees_with_what_an_operation_does():
    assert info.path(torch.device("cuda"), torch.float8_e4m3fn)[0] == "reference"
    assert info.path(torch.device("cuda"), torch.float32)[0] == "triton"
    assert info.path(torch.device("meta"), torch.float32) == (
        "reference",
        "the device is meta, not cuda",
    )
