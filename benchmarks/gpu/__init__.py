"""`python -m benchmarks.gpu`: checks, images and ops on a GPU, each in a call of its own."""

import time

STARTED = time.time()  # before torch is imported, which the commands' deadlines count too
