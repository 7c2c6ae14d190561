"""Settings for all tests."""

import torch

# Several threads on busy cores spin instead of working.
torch.set_num_threads(1)
