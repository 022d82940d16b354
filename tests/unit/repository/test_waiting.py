"""What the suite is run with: a toy model that is slow in child processes too, and gates that hold a child."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny
from tests.waiting import Gate, until

SLEEPS = """
import json, sys, torch, transformers, moa_test_slow
from moa.mixture.generation import native
from moa.mixture.generation.decoding import Decoding
from moa.mixture.generation.decoding import LlamaDecoding
slept, counts = [], {}
moa_test_slow.time.sleep = slept.append
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
ids = torch.tensor([[5, 6, 7]])
model(ids, labels=ids).loss.backward()
counts["training"] = len(slept)
with torch.inference_mode():
    for kind in (Decoding, LlamaDecoding, native.CompiledDecoding if native.supports_native(model) else LlamaDecoding):
        before = len(slept)
        kind(model, ids, torch.ones_like(ids)).step(ids[0, :1])
        counts[kind.__name__] = len(slept) - before
print(json.dumps([counts, min(slept, default=0) > 0]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("factor", "hidden", "passes"), [("10", 128, 2), ("1", 128, 0), ("10", 512, 0)])
def test_a_slow_toy_model_is_slow_in_child_processes_and_real_ones_are_not(tmp_path: Path, factor: str, hidden: int,
                                                                          passes: int) -> None:
    tiny.base(tmp_path, hidden=hidden, layers=1)
    command = ["/bin/sh", "-c", '"$@"', "sh", sys.executable, "-c", SLEEPS, str(tmp_path)]   # a child's child
    done = subprocess.run(command, env={**os.environ, "MOA_TEST_SLOW_MODEL": factor}, text=True, capture_output=True,
                          check=False)
    assert done.returncode == 0, done.stderr
    counts, some = json.loads(done.stdout.splitlines()[-1])
    assert counts.keys() >= {"training", "Decoding", "LlamaDecoding"}
    assert set(counts.values()) == {passes} and some == bool(passes)


def test_a_gate_holds_a_process_until_it_is_opened(tmp_path: Path) -> None:
    gate = Gate(tmp_path, "moa.core.digests:of_json")
    script = ("from moa.core import digests; print('before', flush=True); "
              "digests.of_json({}); print('after', flush=True)")
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True,
                          env={**os.environ, **gate.environment}) as process:
        assert process.stdout is not None and process.stdout.readline() == "before\n"
        assert until(gate.reached, process) == {process.pid}
        assert process.poll() is None
        gate.open()
        assert process.communicate()[0] == "after\n"


def test_waiting_for_a_process_that_ended_is_in_vain(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print('gone')"]
    with (subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process,
          pytest.raises(AssertionError, match=r"ended before, with status 0: .*gone")):
        until(lambda: False, process)
