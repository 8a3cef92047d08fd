"""The trace of s3d profile in TensorBoard's torch-tb-profiler."""

from __future__ import annotations

import gzip
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from s3d.profiling import ProfileConfig, profile


def _has_plugin() -> bool:
    try:
        metadata.version("torch-tb-profiler")
    except metadata.PackageNotFoundError:
        return False
    return True


@pytest.mark.skipif(not _has_plugin(), reason="torch-tb-profiler is not installed (extra: profile)")
def test_the_plugin_of_tensorboard_shows_it(tmp_path: Path) -> None:
    """What the plugin's page asks for, from the plugin itself."""
    size: dict[str, Any] = {"preset": "tiny", "patch_size": (32, 32, 32), "mask_block": 8, "batch_size": 1}
    folder = tmp_path / "profile"
    profile(ProfileConfig(output_dir=folder, steps=2, warmup=1, device="cpu", **size))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--port", str(port)]
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ)
    try:

        def ask(route: str) -> Any:
            url = f"http://127.0.0.1:{port}/data/plugin/pytorch_profiler/{route}"
            with urllib.request.urlopen(url, timeout=30) as answer:
                body = answer.read()
            if answer.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            return json.loads(body)

        end = time.monotonic() + 120
        runs: list[str] = []
        while not runs:
            assert time.monotonic() < end, (tmp_path / "log").read_text()
            time.sleep(0.5)
            try:
                answer = ask("runs")
            except OSError:
                continue
            runs = [] if answer["loading"] else answer["runs"]
        run = runs[0]
        assert {"Overview", "Operator", "Trace", "Memory"} <= set(ask(f"views?run={run}"))
        which = f"run={run}&worker=step&span={ask(f'spans?run={run}&worker=step')[0]}"
        overview = ask(f"overview?{which}&view=Overview")
        assert len(overview["steps"]["rows"]) == 2
        operators = {row["name"] for row in ask(f"operation/table?{which}&group_by=Operation")["data"]}
        assert {"s3d_kernels::conv3d_grad_weight", "s3d_kernels::pool3d"} <= operators
        memory = ask(f"memory?{which}")
        assert any("s3d_kernels::" in row[0] for row in memory["rows"]["CPU"])
        assert ask(f"memory_curve?{which}")["rows"]["CPU"]
        names = {event.get("name") for event in ask(f"trace?{which}")["traceEvents"]}
        layer = "encoder.stages.2.blocks.0.conv1.conv"
        assert {layer, f"{layer} (backward)", "mask_tokens.2", "optimiser"} <= names
    finally:
        server.terminate()
        server.wait(30)
