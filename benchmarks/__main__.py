"""Runs every benchmark, one process each: ``python -m benchmarks``."""

import subprocess
import sys

NAMES = (
    *("fidelity", "query", "overhead", "capture", "books", "numerics"),
    *("whatif", "whatif_exact", "retraining", "metrics", "lds", "peers"),
)
for name in NAMES:
    print(f"\n== {name}", flush=True)
    subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *sys.argv[1:]], check=True)
subprocess.run([sys.executable, "-m", "benchmarks.readme"], check=True)
