"""The optimizer: the strategy `optim`, the optimizers that it builds by name, and what stands in for bitsandbytes."""

from memscope.strategies.optim.kinds import KINDS, optimizer_named
from memscope.strategies.optim.optim import Optim
from memscope.strategies.optim.trainer_names import TRAINER_NAMES, trainer_name

__all__ = ["KINDS", "TRAINER_NAMES", "Optim", "optimizer_named", "trainer_name"]
