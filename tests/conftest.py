"""For every test: small tensors are quicker on one thread, and results do not depend on the machine's cores."""

import torch

torch.set_num_threads(1)
