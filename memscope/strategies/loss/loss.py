"""Head and loss in parts: the logits of all tokens never exist at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from memscope.errors import UsageError
from memscope.strategies import Problem, Stage, Strategy
from memscope.strategies.loss.causal_lm import causal_lm, replace_loss
from memscope.strategies.loss.parts import Labelled, SummedLoss, chunked, fused, has_fused
from memscope.workload.batch import tensors_in
from memscope.workload.description import HeadLoss, Workload

__all__ = ["Loss"]


class Loss(Strategy):
    """Compute the output head and the cross-entropy for one part of the tokens after the other.

    The logits of all tokens, and their gradient, never exist at once. For language models: those of transformers that
    compute their loss themselves, and workloads with `head_loss`.
    """

    name = "loss"
    stage = Stage.WRAP
    exact = True
    trains = "the loss"
    textbook: ClassVar[Mapping[str, str]] = {
        "parameter": "–",
        "activation": "↓",
        "gradient": "–",
        "optimizer_state": "–",
        "computation": "↑",
    }

    @dataclass(frozen=True)
    class Config:
        """How the parts are computed, and their number."""

        chunked: bool = True
        """Each part under a checkpoint, with PyTorch's usual operators: the backward pass computes its logits again."""
        fused: bool = False
        """torch.nn.functional.linear_cross_entropy in place of checkpoints, from PyTorch 2.13 on: the gradients are
        computed in the forward pass, and nothing twice."""
        chunks: int = 8
        """Number of parts."""

        def __post_init__(self) -> None:
            if not self.chunked and not self.fused:
                raise ValueError("choose loss:chunked or loss:fused")

    @classmethod
    def candidates(cls, workload: Workload) -> Sequence[Config]:
        """Fused, where PyTorch has it, or else chunked; none for logits that are small beside the weights."""
        return [cls.Config(fused=has_fused())] if _are_logits_large(workload) else []

    @classmethod
    def left_out(cls, workload: Workload) -> Sequence[Config]:
        """The candidate for small logits."""
        return [] if _are_logits_large(workload) else [cls.Config(fused=has_fused())]

    def check(self, workload: Workload) -> list[Problem]:
        """Report settings out of range, a PyTorch without the function, and a model whose head and loss are unknown."""
        problems = []
        if self.config.chunks < 1:
            problems.append(Problem(f"chunks={self.config.chunks} is not a number of parts", "choose at least 1"))
        if self.config.fused and not has_fused():
            what = "fused needs torch.nn.functional.linear_cross_entropy with options, which PyTorch 2.13 has"
            problems.append(Problem(what, "use loss:chunked"))
        if workload.head_loss is None and causal_lm(workload.model) is None:
            problems.append(Problem(f'the head and the loss of "{workload.name}" cannot be found', _HOW_TO_NAME_THEM))
        return problems

    def apply(self, workload: Workload) -> None:
        """Replace the loss of the workload, or the head and the loss inside a model of transformers."""
        summed, chunks, found = fused if self.config.fused else chunked, self.config.chunks, workload.head_loss
        if found is None:
            replace_loss(causal_lm(workload.model), summed, chunks)
        else:
            workload.loss = _LossInParts(found, summed, chunks)


_LEAST_SHARE = 0.01
"""Logits below this share of the weights are not worth the simulations of all combinations with other strategies."""


def _are_logits_large(workload: Workload) -> bool:
    """Whether the logits of a micro-batch, in float32, are large beside the weights; True if their size is unknown."""
    if workload.head_loss is not None:
        head: Any = workload.model.get_submodule(workload.head_loss.head)
    else:
        model: Any = causal_lm(workload.model)
        head = None if model is None else model.get_output_embeddings()
    pieces = workload.split(workload.batches[0], workload.plan.micro_batches) if len(workload.batches) else []
    integers = [one for one in tensors_in([*pieces]) if not one.is_floating_point()]
    tokens = max((one.numel() for one in integers), default=0)
    if head is None or not tokens:
        return True
    weights = sum(parameter.nbytes for parameter in workload.model.parameters())
    return 4 * tokens * int(head.weight.shape[0]) >= _LEAST_SHARE * weights


@dataclass(frozen=True)
class _LossInParts:
    """The loss of a workload whose head is known: the mean over the tokens with a label."""

    of: HeadLoss
    summed: SummedLoss
    chunks: int

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        inputs, labels = self.of.inputs(model, batch)
        if labels.shape != inputs.shape[:-1]:
            raise UsageError(
                f"loss: head_loss.inputs returned inputs of shape {[*inputs.shape]} and labels of shape "
                f"{[*labels.shape]}: expected a label for each token"
            )
        tokens = Labelled(inputs, labels, self.of.ignored, self.of.upcast)
        return self.summed(model.get_submodule(self.of.head), tokens, self.chunks) / tokens.count


_HOW_TO_NAME_THEM = (
    "give the Workload a head_loss, or train a causal language model of transformers that is given labels; for other "
    "models of a Trainer there is use_liger_kernel=True of TrainingArguments"
)
