"""The cost of every option on every layer, in bytes and time, from simulated steps of the whole model.

Each layer is measured in its place in the model, with the strategies applied, between neighbours that are checkpointed
as a whole. Such a neighbour keeps its input and nothing else, so all other bytes belong to the layer. One simulation
measures many options at once, each on another of several layers that are alike.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from memscope.advisor.measure.layers import groups_of, layer_plan
from memscope.advisor.measure.options import saving_options
from memscope.advisor.measure.probe import ChainSeen, LayerSeen, rounded
from memscope.advisor.measure.reference import Reference, outside_bytes
from memscope.advisor.measure.runner import Answer, Probe, Seen
from memscope.advisor.plan.chain import Chain, Choice
from memscope.analysis.cost import operator_costs
from memscope.errors import MemscopeError
from memscope.simulation.devices.catalogue import Device
from memscope.strategies.ckpt import LayerPlan
from memscope.strategies.ckpt.options import Call
from memscope.trace import PHASES

__all__ = ["LayerCosts", "measure"]

_SEGMENTS = (2, 4)
"""Layers that one checkpoint may cover."""
_WITHOUT_RECOMPUTATION = ("none", "offload")
_RARE = 0.1
"""A class with a smaller share of all layers gets fewer options, because each takes a simulation of its own."""
LayerClasses = tuple[int, ...]
"""The class of each layer that an option covers; layers of one class are alike."""
_Batch = dict[int, tuple[LayerClasses, str]]
"""Tasks of one simulation, by their first layers."""
_NEEDED = ("none", "full")
"""Options without which nothing can be planned."""


@dataclass(frozen=True)
class Measured:
    """One option on one kind of layer, in each deciding micro-batch."""

    seen: tuple[LayerSeen, ...]
    seconds: float
    """Of the layer's forward, recomputation and backward in one step, over all micro-batches. An estimate."""


@dataclass(frozen=True)
class _Around:
    """Bytes outside the layers; fields as in `Chain`."""

    head_forward_bytes: int
    head_backward_bytes: int
    head_saves_input: bool
    fixed_bytes: int

    @classmethod
    def of(cls, seen: Seen, plan: LayerPlan, chains: Sequence[ChainSeen]) -> _Around:
        """Read the bytes from the chains and the trace of a probe."""
        return cls(
            head_forward_bytes=max(chain.head_forward_bytes for chain in chains),
            head_backward_bytes=max(chain.head_backward_bytes for chain in chains),
            head_saves_input=any(chain.head_keeps_input for chain in chains),
            fixed_bytes=outside_bytes(seen.trace, groups_of(plan)),
        )


@dataclass(frozen=True)
class LayerCosts:
    """The measured options, by the kind of layers each covers."""

    reference: Reference
    measured: Mapping[tuple[LayerClasses, str], Measured]
    settled: Mapping[tuple[int, str], Choice] = field(default_factory=dict)
    """Choices read from a plan that was simulated as a whole; exact for that plan."""
    around: _Around | None = None
    """Bytes outside the layers, read from such a plan."""

    def chain(self) -> Chain:
        """The choices for the planner: the largest figures of all deciding micro-batches."""
        reference, classes = self.reference, self.reference.classes
        full = reference.full_chains
        around = self.around or _Around.of(reference.full, reference.layers.checkpointed, full)
        by_kind: dict[LayerClasses, list[str]] = defaultdict(list)
        for kind, option in self.measured:
            by_kind[kind].append(option)
        choices = [
            tuple(
                self.settled.get((start, option)) or self._choice(start, kind, option)
                for length in (1, *_SEGMENTS)
                if start + length <= len(classes)
                for kind in [tuple(classes[start : start + length])]
                for option in by_kind.get(kind, ())
                if option in _WITHOUT_RECOMPUTATION or all(reference.layers.may_recompute[start : start + length])
            )
            for start in range(len(classes))
        ]
        inputs = [[layer.input_bytes for layer in chain.layers] + [chain.output_bytes] for chain in full]
        return Chain(
            choices=tuple(choices),
            boundary_bytes=tuple(map(max, zip(*inputs, strict=True))),
            head_forward_bytes=around.head_forward_bytes,
            head_backward_bytes=around.head_backward_bytes,
            head_saves_input=around.head_saves_input,
            fixed_bytes=around.fixed_bytes,
        )

    def _choice(self, start: int, kind: LayerClasses, option: str) -> Choice:
        found = self.measured[kind, option]
        full = self.reference.full_chains
        pairs = list(zip(found.seen, full, strict=True))
        plain = sum(self.measured[(one,), "none"].seconds for one in kind)
        return Choice(
            option=option,
            length=len(kind),
            kept_bytes=max(seen.kept_bytes for seen in found.seen),
            held_bytes=max(seen.held_bytes for seen in found.seen),
            forward_bytes=max(c.layers[start].forward_base_bytes + seen.forward_rise_bytes for seen, c in pairs),
            backward_bytes=max(
                c.layers[start + len(kind) - 1].backward_base_bytes + seen.backward_rise_bytes for seen, c in pairs
            ),
            nanoseconds=max(0, round(1e9 * (found.seconds - plain))),
            saves_input=any(seen.keeps_input for seen in found.seen),
            saves_output=self._saves_output(kind, option),
        )

    def _saves_output(self, kind: LayerClasses, option: str) -> bool:
        """Whether the option's graph keeps its output, as seen where the next layer does not keep its own input.

        A checkpoint around a whole layer keeps no output. A checkpoint around a part of a layer leaves its end as it
        was.
        """
        if option.startswith(("full", "save:", "offload")):
            return False
        classes = self.reference.classes
        for layer in range(len(classes) - 1):
            if (classes[layer],) == kind:
                after = self.measured[(classes[layer + 1],), "none"]
                if not any(seen.keeps_input for seen in after.seen):
                    return any(chain.layers[layer + 1].keeps_input for chain in self.reference.none_chains)
        return False

    def settle(self, plan: LayerPlan, seen: Seen) -> LayerCosts:
        """The costs corrected by the simulation of a whole plan, for the options of that plan."""
        reference, names = self.reference, self.reference.layers.names
        chains, groups = reference.look(seen, plan, 1), groups_of(plan)
        starts = [names.index(group[0]) for group in groups]
        choices = [
            self._choice(start, tuple(reference.classes[start : start + len(group)]), plan.layers[group[0]])
            for start, group in zip(starts, groups, strict=True)
        ]
        settled = dict(self.settled)
        previous_saves_output = False
        for index, (start, choice) in enumerate(zip(starts, choices, strict=True)):
            layers = [chain.layers[index] for chain in chains]
            lent = previous_saves_output and not choice.saves_input  # the planner counts it for the layer before
            # An input that is kept though its own layer does not keep it: the layer before keeps its output.
            after = index + 1 < len(groups) and not choices[index + 1].saves_input
            kept_after = after and any(chain.layers[index + 1].keeps_input for chain in chains)
            previous_saves_output = choice.saves_output or kept_after
            settled[start, choice.option] = replace(
                choice,
                kept_bytes=max(layer.kept_bytes for layer in layers),
                held_bytes=max(layer.held_bytes for layer in layers),
                forward_bytes=max(layer.forward_base_bytes + layer.forward_rise_bytes for layer in layers),
                backward_bytes=max(
                    layer.backward_base_bytes + layer.backward_rise_bytes - (layer.input_bytes if lent else 0)
                    for layer in layers
                ),
                saves_output=previous_saves_output,
            )
        return replace(self, settled=settled, around=_Around.of(seen, plan, chains))


def measure(ask: Callable[[Sequence[Probe]], list[Answer]], found: Reference, device: Device) -> LayerCosts:
    """Measure every option on every kind of layer; `ask` runs the probes.

    Offloading is an option if the device's copy rate to the host is known. An option that fails on a kind of layers is
    left out.

    Raises:
        MemscopeError: when the model cannot be checkpointed.
    """
    tasks = list(_tasks(found, offload=device.host_bytes_per_second is not None))
    names = found.layers.names
    measured: dict[tuple[LayerClasses, str], Measured] = {}
    for batch, plan, seen in _answered(ask, found, _packed(tasks, found.classes)):
        chains = found.look(seen, plan, found.steps - 1)
        groups = groups_of(plan)
        heads = {group[0]: index for index, group in enumerate(groups)}
        for start, (kind, option) in batch.items():
            index = heads[names[start]]
            measured[kind, option] = Measured(
                tuple(chain.layers[index] for chain in chains),
                found.seconds(seen, groups[index], found.steps - 1),
            )
    return LayerCosts(found, measured)


def _answered(
    ask: Callable[[Sequence[Probe]], list[Answer]], found: Reference, batches: Sequence[_Batch]
) -> Iterable[tuple[_Batch, LayerPlan, Seen]]:
    """Each batch with its plan and simulation. A batch that fails is split, and the options that fail are left out."""
    plans = [_probe_plan(found, batch) for batch in batches]
    probes = [
        Probe(found.strategies, plan, calls_of=found.layers.names, steps=found.steps, whole=False) for plan in plans
    ]
    failed: list[_Batch] = []
    for batch, plan, answer in zip(batches, plans, ask(probes), strict=True):
        if not isinstance(answer, MemscopeError):
            yield batch, plan, answer
        elif len(batch) > 1:
            failed += [{start: task} for start, task in batch.items()]
        elif any(option in _NEEDED for _, option in batch.values()):
            raise answer
    if failed:
        yield from _answered(ask, found, failed)


def _tasks(found: Reference, *, offload: bool) -> Iterable[tuple[LayerClasses, str]]:
    """Everything to measure: options of single layers, and segments of consecutive layers."""
    classes = found.classes
    for number in dict.fromkeys(classes):
        layer = classes.index(number)
        saving, children = _saving(found, layer), found.layers.children[layer]
        if classes.count(number) < _RARE * len(classes):
            saving, children = saving[len(saving) // 2 :][:1], ()
        if not found.layers.can_recompute[layer]:
            saving, children = [], ()
        options = ["none", *(["full"] if found.layers.can_recompute[layer] else []), *children, *saving]
        options += ["offload"] if offload else []
        for option in options:
            yield (number,), option
    for length in _SEGMENTS:
        kinds = (tuple(classes[start : start + length]) for start in range(len(classes) - length + 1))
        for kind in dict.fromkeys(kinds):
            if len(set(kind)) == 1 and found.layers.can_recompute[classes.index(kind[0])]:
                yield kind, f"full:{length}"


def _saving(found: Reference, layer: int) -> list[str]:
    """The `save` options of a layer: subsets of the operators that a checkpoint of the whole layer runs again.

    Recomputation stops as soon as the backward pass has all it needs, so the last operators are not among them.
    """
    name, step, piece = found.layers.names[layer], 1, found.deciding[-1]
    forward = operator_costs(found.none.trace, step=step, phase="forward", micro_batch=piece)
    again = operator_costs(found.full.trace, step=step, phase="recompute", micro_batch=piece)
    seconds: dict[Call, float] = defaultdict(float)
    for module, op in forward.keys() & again.keys():
        if module == name or module.startswith(f"{name}."):
            seconds[_inside(name, module), _packet(op)] += forward[module, op].seconds
    trace = found.none.trace
    size_bytes: dict[Call, int] = defaultdict(int)
    sizes = rounded(trace)
    here = (trace.step == step) & (trace.micro_batch == piece) & (trace.phase == PHASES.index("forward"))
    for index in here.nonzero()[0]:
        module, op = trace.modules[int(trace.module[index])], trace.ops[int(trace.op[index])]
        if module == name or module.startswith(f"{name}."):
            size_bytes[_inside(name, module), _packet(op)] += int(sizes[index])
    kept = found.none_chains[-1].layers[layer]
    return saving_options(seconds, size_bytes, kept.kept_bytes + kept.input_bytes * kept.keeps_input)


def _inside(layer: str, module: str) -> str:
    return module[len(layer) + 1 :] or "."


def _packet(op: str) -> str:
    return op.rpartition(".")[0]


def _packed(tasks: Sequence[tuple[LayerClasses, str]], classes: Sequence[int]) -> list[_Batch]:
    """Pack the tasks into few simulations, with at least one layer between two tasks."""
    batches: list[_Batch] = []
    for kind, option in tasks:
        places = [s for s in range(len(classes) - len(kind) + 1) if tuple(classes[s : s + len(kind)]) == kind]
        for batch in batches:
            place = next((s for s in places if _is_free(batch, s, len(kind))), None)
            if place is not None:
                batch[place] = (kind, option)
                break
        else:
            batches.append({places[0]: (kind, option)})
    return batches


def _is_free(batch: _Batch, start: int, length: int) -> bool:
    """Whether no other task takes the layers from `start` or their neighbours."""
    return all(start > other + len(kind) or start + length < other for other, (kind, _) in batch.items())


def _probe_plan(found: Reference, batch: _Batch) -> LayerPlan:
    names = found.layers.names
    options: list[tuple[str, int]] = []
    layer = 0
    while layer < len(names):
        kind, option = batch.get(layer, ((0,), "full" if found.layers.can_recompute[layer] else "none"))
        options.append((option, len(kind)))
        layer += len(kind)
    return layer_plan(names, options)
