"""`python -m benchmarks.gpu`: build, tests, sanitizers and timings of a GPU in one run."""
