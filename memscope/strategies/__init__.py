"""Strategies: plugins that change how a training step uses memory. One file per technique."""

from memscope.strategies.plan import Plan, read_alternatives, read_strategies
from memscope.strategies.plugins import available
from memscope.strategies.strategy import Problem, Stage, Strategy

__all__ = ["Plan", "Problem", "Stage", "Strategy", "available", "read_alternatives", "read_strategies"]
