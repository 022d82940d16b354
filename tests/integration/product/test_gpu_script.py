"""`benchmarks/gpu.sh`, which is for machines with a GPU, runs here on tiny shapes, without what it must not need."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from tests.tiny import REPOSITORY

# Requirements of moa that a machine with a card need not have.
ABSENT = ("pydantic", "ruamel", "ruamel.yaml", "prefect", "dvc", "mlflow", "datasets", "fastapi")


@pytest.mark.skipif(torch.cuda.is_available(), reason="here the script would measure")
def test_every_part_runs_without_a_gpu_and_without_other_packages(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({ABSENT!r}))\n")
    done = subprocess.run([REPOSITORY / "benchmarks" / "gpu.sh"], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(tmp_path), "OUT": str(tmp_path / "out"),
                               "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    stored = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert result.items() <= stored.items() and result["goals"] == []
    figures = result["figures"]
    assert not [part for part in figures.values() if isinstance(part, dict) and "failed" in part], figures
    assert figures["tests"]["exit code"] == 0 and figures["tests"]["failed tests"] == "none"
    assert figures["training"]["over PEFT"] > 0 and figures["decoding"]["over PEFT's adapter_names"] > 0
    assert figures["quantised"]["left out"] and figures["profile"]["training"] and figures["profile"]["decoding"]
    assert "tokens/s, 8 experts" in (tmp_path / "out" / "gpu.txt").read_text()


def test_a_part_that_fails_stops_no_other_and_says_why(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['peft'] = None\n")
    done = subprocess.run([REPOSITORY / "benchmarks" / "gpu.sh", "decoding", "quantised"], capture_output=True,
                          text=True, env={**os.environ, "PYTHONPATH": str(tmp_path), "OUT": str(tmp_path / "out"),
                                          "OMP_NUM_THREADS": "1"})
    figures = json.loads(done.stdout.splitlines()[-1])["figures"]
    assert done.returncode == 0 and "peft" in figures["decoding"]["failed"] and "left out" in figures["quantised"]
    wrong = subprocess.run([REPOSITORY / "benchmarks" / "gpu.sh", "cooking"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "there is no part cooking; there are tests, training" in wrong.stderr
