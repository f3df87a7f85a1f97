"""One thread for every test: faster with small tensors, and results do not depend on the number of cores."""

import torch

torch.set_num_threads(1)
