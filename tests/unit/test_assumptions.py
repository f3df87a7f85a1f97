"""Values that nobody can know before a run are assumed, and each assumption is listed once with the user's line."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from memscope import Workload, simulate
from memscope.analysis.notes import notes_of
from memscope.errors import TargetError, UsageError
from memscope.trace import Trace

TOKENS, WIDTH, EXPERTS, CHOSEN = 12, 8, 4, 2


def asked(question, assume="", device="gpu", batch=None):
    """The answers to `question(y, model)`, where `y` depends on weights, and the trace."""
    answers = []

    def loss(model, x):
        y = model(x)
        answers.append(question(y, model))
        return y.square().mean()

    def build():
        data = torch.randn(TOKENS, WIDTH) if batch is None else batch
        return Workload(nn.Linear(WIDTH, WIDTH), [data], loss, torch.optim.SGD)

    trace = simulate(build, device=device, assume=assume)
    assert answers[0] == answers[1]
    return answers[0], trace


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        (lambda y, model: y.mean().item(), 1.0),
        (lambda y, model: bool(torch.isfinite(y).all()), True),
        (lambda y, model: bool(torch.isfinite(y.mean())), True),
        (lambda y, model: bool(torch.isnan(y).any()), False),
        (lambda y, model: bool(torch.isinf(y).any()), False),
        (lambda y, model: bool(y.mean() > 1e4), False),
        (lambda y, model: bool(y.mean() < torch.tensor(100.0)), True),
        (lambda y, model: [*y.nonzero().shape], [TOKENS * WIDTH, 2]),
        (lambda y, model: [*y[y > 0.5].shape], [TOKENS * WIDTH]),
        (lambda y, model: [*y[(y > 0.5).any(-1)].shape], [TOKENS, WIDTH]),
        (lambda y, model: [*y.masked_select(y > 0).shape], [TOKENS * WIDTH]),
        (lambda y, model: y.argmax(-1).tolist(), [row % WIDTH for row in range(TOKENS)]),
        (lambda y, model: torch.equal(y, y + 1), False),
        (lambda y, model: y.detach().cpu().numpy().tolist(), [[1.0] * WIDTH] * TOKENS),
    ],
    ids=[
        "number", "finite", "finite number", "nan", "inf", "bound", "tensor bound", "nonzero", "mask", "rows",
        "masked_select", "argmax", "equal", "array",
    ],
)  # fmt: skip
def test_what_depends_on_weights_is_assumed_and_listed_with_the_line(question, expected):
    answer, trace = asked(question)
    assert answer == expected
    (assumption,) = trace.meta["assumptions"]  # once, though two steps asked
    assert "test_assumptions.py" in assumption["where"]
    assert "lambda y, model:" in assumption["where"]
    with pytest.raises(TargetError, match=r"needs the values? of a tensor.*in <lambda>"):
        asked(question, assume="refuse")


def test_a_run_that_asks_for_no_value_assumes_nothing():
    assert asked(lambda y, model: (y > 0).sum() is None)[1].meta["assumptions"] == []


def test_a_mask_of_known_numbers_selects_what_it_selects():
    batch = torch.zeros(TOKENS, WIDTH)
    batch[:3] = 2.0
    seen = []

    def loss(model, x):
        y = model(x)
        seen.append(y[x.sum(-1) > 1].shape[0])
        return y.mean()

    trace = simulate(lambda: Workload(nn.Linear(WIDTH, WIDTH), [batch], loss, torch.optim.SGD))
    assert seen == [3, 3]
    assert trace.meta["assumptions"] == []


def test_the_gradient_of_rows_that_a_mask_selects_reaches_the_weights():
    """12 rows of 8 floats are selected, and their gradient has as many."""
    trace = simulate(
        lambda: Workload(
            nn.Linear(WIDTH, WIDTH),
            [torch.randn(TOKENS, WIDTH)],
            lambda m, x: (lambda y: y[y[:, 0] > 0].square().mean())(m(x)),
            torch.optim.SGD,
        )
    )
    selected = trace.requested[trace.op == trace.ops.index("aten.index.Tensor")]
    assert set(selected.tolist()) == {4 * TOKENS * WIDTH}
    assert trace.max_by_category()["gradient"] > 0


class Experts(nn.Module):
    """A layer of experts as a loop: each expert runs on the tokens that chose it."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(EXPERTS))
        self.loads = []

    def forward(self, x):
        weights, chosen = torch.topk(self.router(x).softmax(-1), CHOSEN)
        mask = F.one_hot(chosen, EXPERTS).permute(2, 1, 0)
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            place, token = torch.where(mask[index])
            self.loads.append(len(token))
            out = out.index_add(0, token, expert(x[token]) * weights[token, place, None])
        return out


def routed(assume):
    model = []

    def build():
        model[:] = [Experts()]
        return Workload(model[0], [torch.randn(TOKENS, WIDTH)], lambda m, x: m(x).square().mean(), torch.optim.SGD)

    trace = simulate(build, assume=assume, steps=1)
    return model[0].loads, trace


@pytest.mark.parametrize(
    ("assume", "loads", "value"),
    [
        ("", [6, 6, 6, 6], "each of 4 equally often"),  # 12 tokens choose 2 experts each: 24 choices for 4 experts
        ("experts=balanced", [6, 6, 6, 6], "each of 4 equally often"),
        ("experts=worst", [12, 12, 0, 0], "always the first 2 of 4"),
    ],
)
def test_a_router_sends_tokens_as_assumed(assume, loads, value):
    found, trace = routed(assume)
    assert found == loads
    (assumption,) = trace.meta["assumptions"]
    assert (assumption["what"], assumption["value"]) == ("the choices of torch.topk", value)
    assert assumption["where"].endswith("in forward: weights, chosen = torch.topk(self.router(x).softmax(-1), CHOSEN)")


def test_choices_that_decide_no_size_are_not_listed():
    _, trace = asked(lambda y, model: y.gather(-1, y.argmax(-1, keepdim=True)) is None)
    assert trace.meta["assumptions"] == []
    _, trace = asked(lambda y, model: y.topk(2).indices.sum(-1) is None)
    assert trace.meta["assumptions"] == []


def test_the_number_of_tokens_of_each_expert_is_known_from_a_histogram():
    def question(y, model):
        chosen = y[:, :EXPERTS].topk(1).indices.flatten()
        counted = torch.bincount(chosen, minlength=EXPERTS).tolist()
        return counted, torch.histc(chosen.int(), bins=EXPERTS, min=0, max=EXPERTS - 1).tolist()

    answer, _ = asked(question)
    assert answer == ([3] * EXPERTS, [3] * EXPERTS)


def test_a_layer_is_not_dropped_at_random():
    answer, trace = asked(lambda y, model: bool(torch.rand([]) < 0.1))  # as BART's and Wav2Vec2's encoders ask
    assert answer is False
    assert len(trace.meta["assumptions"]) == 1


def test_integers_that_a_target_draws_are_drawn_the_same_in_every_simulation():
    def build(seen):
        ids = torch.randint(0, 50, (TOKENS,))
        seen.append((ids < 25).nonzero().shape[0])
        return Workload(nn.Embedding(50, WIDTH), [ids], lambda m, x: m(x).mean(), torch.optim.SGD)

    one, other = [], []
    state = torch.get_rng_state()
    trace = simulate(lambda: build(one))
    simulate(lambda: build(other))
    assert one == other
    assert torch.equal(torch.get_rng_state(), state)
    assert trace.meta["assumptions"][0]["value"] == "a draw with seed 0"


def test_an_assumption_is_a_note_of_the_trace_and_survives_its_file(tmp_path):
    _, trace = asked(lambda y, model: y.mean().item())
    trace.save(tmp_path / "a.npz")
    (note,) = notes_of(Trace.load(tmp_path / "a.npz"))
    assert note.startswith("Assumed: a floating-point number that the program reads: 1.0 (at ")


def test_an_unknown_integer_is_refused_even_where_assumptions_are_allowed():
    with pytest.raises(TargetError, match="needs the value of a tensor"):
        asked(lambda y, model: int((y * 10).long().max()))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("refused", 'did you mean "refuse"'),
        ("experts=balance", 'did you mean "balanced"'),
        ("experts", "experts=balanced"),
    ],
)
def test_an_assumption_that_cannot_be_read_is_an_error(text, message):
    with pytest.raises(UsageError, match=message):
        asked(lambda y, model: None, assume=text)
