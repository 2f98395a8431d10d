"""Settings of every test: one thread, one hypothesis profile."""

import os

import hypothesis
import torch

torch.set_num_threads(1)

# Derandomized: a test that passes today passes tomorrow. Deadlines measure the machine, not us.
hypothesis.settings.register_profile(
    "default", deadline=None, derandomize=True, max_examples=25, print_blob=True
)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=300)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
