"""The strategy `peft`: any method of Hugging Face's PEFT by name, with the library's own modules."""

from memscope.strategies.peft.method import PeftMethod

__all__ = ["PeftMethod"]
