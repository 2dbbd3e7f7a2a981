"""`python -m benchmarks.gemm` runs and writes its records."""

import json
import subprocess
import sys
from pathlib import Path

from tests.support.native import needs_native


@needs_native
def test_a_run_writes_its_records(tmp_path):
    file = tmp_path / "new" / "gemm.json"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gemm", "--threads", "1", "--widths", "16",
         "--rows", "3", "--seconds", "0.01", "--output", str(file)],
        cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    records = json.loads(file.read_text("utf-8"))["records"]
    assert [record["layer"] for record in records] == ["qkv", "proj", "fc1", "fc2"]
    assert all(record["rows"] == 3 and record["gflops"]["ours, fused"] > 0 for record in records)
    assert len(done.stdout.splitlines()) == 1 + len(records)
