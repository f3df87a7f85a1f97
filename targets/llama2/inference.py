"""Generation as a workload: `memscope profile targets/llama2 --set mode=generate`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from torch import nn

from memscope.errors import UsageError
from memscope.targets.llama2.alpaca import Sample
from memscope.targets.llama2.config import Config
from memscope.targets.llama2.decoding import Continuation, Decoding
from memscope.targets.llama2.generation import generate
from memscope.targets.llama2.model import Llama
from memscope.workload.description import Workload

__all__ = ["generation_workload"]


def generation_workload(model: Callable[[], Llama], samples: Sequence[Sample], config: Config) -> Workload:
    """A workload whose step continues the prompts of `micro_batch` samples by `new_tokens` tokens each.

    No token ends a text, so every step is as long as it can be. With `seq_len`, prompts have that many tokens.

    Raises:
        UsageError: a prompt leaves no room for the new tokens in the context; or see `Decoding`.
    """
    decoding = Decoding(max_new_tokens=config.new_tokens, beams=config.beams, cache=config.cache)
    prompts = [_prompt(sample) for sample in samples]
    longest = max(map(len, prompts))
    if longest + config.new_tokens > config.max_seq_len:
        raise UsageError(
            f"new_tokens={config.new_tokens}: the longest prompt has {longest} tokens, and the context (max_seq_len) "
            f"{config.max_seq_len}: choose new_tokens={config.max_seq_len - longest} or fewer, or --set "
            f"max_seq_len={longest + config.new_tokens}"
        )

    def run(model: nn.Module, prompts: list[list[int]]) -> list[Continuation]:
        assert isinstance(model, Llama), "strategies change the model in place"
        return generate(model, prompts, decoding, eos_id=None)

    size = config.micro_batch
    count = -(-len(prompts) // size)
    return Workload(
        model=model(),
        batches=[[prompts[(step * size + i) % len(prompts)] for i in range(size)] for step in range(count)],
        loss=run,
        optimizer_factory=None,
        name="llama2",
        settings=dataclasses.asdict(config),
        positions=config.max_seq_len,
    )


def _prompt(sample: Sample) -> list[int]:
    """The tokens without a loss; all of them if every token has one."""
    return list(sample.tokens[: sample.prompt_tokens or len(sample.tokens)])
