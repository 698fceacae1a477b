"""Ours beside a baseline, in one run. `python -m benchmarks` runs them all."""

import os

# Read when the libraries are imported: tables are the output, not their bars and warnings.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TQDM_DISABLE", "1")
