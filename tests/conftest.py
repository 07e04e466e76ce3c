"""Shared by all tests: no timed tests, and one torch thread, because their models are tiny."""

import torch
from hypothesis import settings

settings.register_profile("package", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("package")
torch.set_num_threads(1)
