"""Generation: its results, its memory, its errors and its command."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from llamas import SMALL, model_of, saved

from memscope import Recorder, Trace
from memscope.command.run import run_command
from memscope.errors import MemscopeError, UsageError
from memscope.strategies.lora import LoRALinear, adapt
from memscope.targets.llama2.adapters import save_adapter
from memscope.targets.llama2.alpaca import Instruction
from memscope.targets.llama2.beam_search import beam_search
from memscope.targets.llama2.decoding import Limit, TextSearch
from memscope.targets.llama2.generate import _streamed, command, load_model
from memscope.targets.llama2.generation import Continuation, Decoding, generate
from memscope.targets.llama2.target import SHIPPED_TOKENIZER
from memscope.targets.training.tokenizer import Tokenizer

PROMPTS = [[1, 7, 9], [1, 5, 600, 31, 8, 77, 2, 4, 100], [1], [1, 7, 9]]
WAYS = {
    "greedy": Decoding(max_new_tokens=8),
    "drawn": Decoding(max_new_tokens=8, temperature=0.9, top_k=50, top_p=0.95, seed=3),
    "beams": Decoding(max_new_tokens=8, beams=3),
}


# Results.


@pytest.mark.parametrize("way", WAYS)
def test_prompts_of_different_lengths_are_continued_as_if_each_were_alone(way: str) -> None:
    model, decoding = model_of(), WAYS[way]
    together = generate(model, PROMPTS, decoding, eos_id=None)
    for index, prompt in enumerate(PROMPTS):
        of_its_own = dataclasses.replace(decoding, seed=decoding.seed + index)
        assert generate(model, [prompt], of_its_own, eos_id=None) == [together[index]]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("changes", [{}, {"attention": "sdpa"}, {"sliding_window": 4}, {"dtype": "fp64"}], ids=str)
def test_the_cache_changes_no_token(way: str, changes: dict[str, Any]) -> None:
    model = model_of(dataclasses.replace(SMALL, **changes))
    one, other = (
        generate(model, PROMPTS, dataclasses.replace(WAYS[way], cache=cache), eos_id=5) for cache in (True, False)
    )
    assert one == other


def test_logits_at_the_end_of_a_padded_row_are_those_of_the_row_alone() -> None:
    model = model_of()
    rows = torch.tensor([PROMPTS[0] + [0] * 6, PROMPTS[1]])
    logits = model(rows, torch.tensor([2, 8]))
    assert logits.shape == (2, SMALL.vocab_size)
    torch.testing.assert_close(logits[0], model(rows[:1, :3])[0, -1])
    torch.testing.assert_close(logits[1], model(rows[1:])[0, -1])


def test_the_same_seed_gives_the_same_text_and_another_seed_another() -> None:
    model = model_of()
    first, again, other = (
        generate(model, PROMPTS, dataclasses.replace(WAYS["drawn"], seed=seed), eos_id=None) for seed in (3, 3, 100)
    )
    assert first == again
    assert all(one != another for one, another in zip(first, other, strict=True))
    assert first[0] != first[3]  # the same prompt, sampled anew


def test_random_state_is_unchanged() -> None:
    model = model_of()
    before = torch.get_rng_state()
    generate(model, PROMPTS, WAYS["drawn"], eos_id=None)
    assert torch.equal(torch.get_rng_state(), before)


def test_dropout_is_off_and_the_model_is_back_in_training_mode_afterwards() -> None:
    model = model_of()
    adapt(model, ["layers.0.attention.wq"], r=2, alpha=50.0, dropout=0.9)
    layer = model.layers[0].attention.wq
    assert isinstance(layer, LoRALinear)
    with torch.no_grad():
        layer.lora_b.normal_()
    model.train()
    found = [generate(model, PROMPTS, WAYS["greedy"], eos_id=None) for _ in range(3)]
    assert found[0] == found[1] == found[2]
    assert model.training
    assert layer.dropout.training


def test_a_text_ends_when_the_context_is_full() -> None:
    model = model_of(dataclasses.replace(SMALL, max_seq_len=6))
    short, long = generate(model, [PROMPTS[0], [1, 2, 3, 4, 5]], WAYS["greedy"], eos_id=None)
    assert (len(short.tokens), short.ended_by) == (3, "context")
    assert (len(long.tokens), long.ended_by) == (1, "context")


def test_every_forward_pass_reports_the_tokens_so_far() -> None:
    seen: list[list[tuple[int, ...]]] = []
    model, decoding = model_of(), Decoding(max_new_tokens=4)
    (endless,) = generate(model, PROMPTS[:1], decoding, eos_id=None)
    ended, other = generate(model, [PROMPTS[0], [1, 5]], decoding, eos_id=endless.tokens[1], on_token=seen.append)
    assert ended == Continuation(endless.tokens[:1], "eos")
    assert [new[0] for new in seen] == [endless.tokens[:count] for count in (1, 1, 1, 1)]
    assert [new[1] for new in seen] == [other.tokens[:count] for count in (1, 2, 3, 4)]


def steer(search: TextSearch, logits_after: Callable[[list[int]], list[float]]) -> Continuation:
    """Run a search on a table of probabilities in place of a model."""
    rows = next(search)
    while True:
        try:
            rows = search.send(torch.tensor([logits_after(row) for row in rows]).log())
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]


A, B, EOS = 0, 1, 2


def test_beam_search_finds_the_likelier_text_after_a_less_likely_token() -> None:
    # A is likelier than B (0.6, 0.4), but B EOS (0.4 · 0.9 = 0.36) is likelier than any text with A first: A EOS has
    # 0.6 · 0.4 = 0.24.
    table = {(): [0.6, 0.4, 1e-9], (A,): [0.3, 0.3, 0.4], (B,): [0.05, 0.05, 0.9]}
    search = beam_search([], Limit(2, "length"), Decoding(beams=2), EOS)
    assert steer(search, lambda row: table[tuple(row)]) == Continuation((B,), "eos")


@pytest.mark.parametrize(
    ("length_penalty", "expected"), [(0.0, Continuation((), "eos")), (1.0, Continuation((A, A), "length"))]
)
def test_the_length_penalty_decides_between_a_likely_short_text_and_a_long_one(
    length_penalty: float, expected: Continuation
) -> None:
    # EOS at once has log 0.4 = -0.92, with length 1. A A has log (0.5 · 0.7) = -1.05: less, but -0.52 per token.
    first, later = [0.5, 0.1, 0.4], [0.7, 0.2, 0.1]
    search = beam_search([], Limit(2, "length"), Decoding(beams=2, length_penalty=length_penalty), EOS)
    assert steer(search, lambda row: later if row else first) == expected


def test_beam_search_ends_when_no_beam_is_better_than_the_finished_texts() -> None:
    # After the first token: EOS is finished (log 0.3 = -1.20), A and B go on. After the second: A EOS (log 0.45 / 2 =
    # -0.40) and B EOS (log 0.18 / 2 = -0.86) are the two best; A A, which goes on, has only log 0.025 / 2 = -1.84.
    asked: list[list[int]] = []

    def logits_after(row: list[int]) -> list[float]:
        asked.append(row)
        return [0.05, 0.05, 0.9] if row else [0.5, 0.2, 0.3]

    search = beam_search([], Limit(50, "length"), Decoding(beams=2), EOS)
    assert steer(search, logits_after) == Continuation((A,), "eos")
    assert asked == [[], [A], [B]]


# Memory.

MARK = 12_347
"""Bytes of a tensor allocated between two tokens, to find that moment in a trace."""


def recorded(decoding: Decoding, prompts: list[list[int]]) -> tuple[Trace, list[Continuation]]:
    """A trace of generation, and its result."""
    model = model_of()

    def mark(new: list[tuple[int, ...]]) -> None:
        torch.empty(MARK, dtype=torch.uint8)

    with Recorder(model) as recorder:
        found = generate(model, prompts, decoding, eos_id=None, on_token=mark)
    return recorder.trace(), found


def bytes_of_model() -> int:
    model = model_of()
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("way", WAYS)
def test_without_a_cache_only_the_model_is_held_between_two_tokens(way: str) -> None:
    trace, _ = recorded(dataclasses.replace(WAYS[way], cache=False), PROMPTS)
    moments = trace.born[trace.size == MARK]
    assert len(moments) == WAYS[way].max_new_tokens
    assert {int(size) - MARK for size in trace.allocated[moments]} == {bytes_of_model()}


@pytest.mark.parametrize("way", WAYS)
def test_generation_keeps_no_activation(way: str) -> None:
    trace, _ = recorded(WAYS[way], PROMPTS)
    largest = trace.max_by_category()
    assert {category for category, size in largest.items() if size} == {"parameter", "buffer", "temporary"}


def test_a_forward_pass_for_training_keeps_activations() -> None:
    model = model_of()  # without this, the claim above would prove nothing
    with Recorder(model) as recorder:
        model(torch.tensor(PROMPTS[:1])).sum().backward()
    assert recorder.trace().max_by_category()["activation"] > 0


def test_between_two_tokens_the_cache_is_held_and_nothing_else() -> None:
    trace, _ = recorded(Decoding(max_new_tokens=5), [PROMPTS[1]])
    a_token = 2 * SMALL.n_layers * 2 * 8 * 4  # keys and values, layers, their heads, size of a head, bytes of float32
    held = [int(size) - MARK - bytes_of_model() for size in trace.allocated[trace.born[trace.size == MARK]]]
    assert held == [a_token * (len(PROMPTS[1]) + token) for token in range(5)]


def test_without_a_cache_the_peak_of_many_tokens_is_that_of_the_last_one_alone() -> None:
    prompt = PROMPTS[1]
    trace, (found,) = recorded(Decoding(max_new_tokens=10, cache=False), [prompt])
    last, _ = recorded(Decoding(max_new_tokens=1, cache=False), [[*prompt, *found.tokens[:9]]])
    assert trace.peak.allocated_bytes == last.peak.allocated_bytes
    first, _ = recorded(Decoding(max_new_tokens=1, cache=False), [prompt])
    assert first.peak.allocated_bytes < last.peak.allocated_bytes


# Errors.


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0: expected a whole number from 1"),
        ({"beams": 0}, "beams=0: expected a whole number from 1"),
        ({"temperature": -0.5}, "temperature=-0.5: expected a number from 0"),
        ({"temperature": float("nan")}, "temperature=nan: expected a number from 0"),
        ({"temperature": 1.0, "top_k": 0}, "top_k=0: expected a whole number from 1"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p=1.5: expected a share of the probability, above 0 and up to 1"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p=0.0: expected a share of the probability, above 0 and up to 1"),
        ({"seed": -1}, "seed=-1: expected a whole number from 0"),
        ({"beams": 2, "length_penalty": 99.0}, "length_penalty=99.0: expected a number from -10 to 10"),
        ({"beams": 4, "temperature": 0.7}, "beams=4 with temperature=0.7: beam search does not sample"),
        ({"beams": 4, "top_k": 9}, "beams=4 with top_k=9: beam search does not sample"),
        ({"top_p": 0.9}, "top_p=0.9 with temperature=0: nothing is sampled: set temperature=1"),
        ({"length_penalty": 2.0}, "length_penalty=2.0 with beams=1: only beam search uses it"),
    ],
)
def test_contradictory_or_invalid_settings_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError) as refused:
        Decoding(**settings)
    assert told in str(refused.value)


def test_every_problem_of_the_settings_is_reported_at_once() -> None:
    with pytest.raises(UsageError, match=r"(?s)beams=0.*temperature=-1.*top_p=2"):
        Decoding(beams=0, temperature=-1, top_p=2)


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        ([], "prompt 2 is empty"),
        ([1] * 512, r"prompt 2 has 512 tokens.*the context \(max_seq_len\) of 512.*511 tokens or fewer"),
        ([1, 1024], "prompt 2 has token 1024, but the model's tokens are 0 to 1023"),
        ([1, -1], "prompt 2 has token -1, but the model's tokens are 0 to 1023"),
    ],
)
def test_prompts_that_cannot_be_continued_are_refused(prompt: list[int], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        generate(model_of(), [[1], prompt], Decoding(), eos_id=None)


def test_broken_weights_are_an_error_instead_of_nonsense() -> None:
    model = model_of()
    with torch.no_grad():
        model.layers[0].feed_forward.w1.weight[0, 0] = torch.nan
    for decoding in WAYS.values():
        with pytest.raises(MemscopeError, match="the model's logits are not finite"):
            generate(model, PROMPTS, decoding, eos_id=None)


# The command.

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = saved(tmp_path_factory.mktemp("weights") / "small", "huggingface")
    shutil.copy(SHIPPED_TOKENIZER, folder / "tokenizer.model")
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], weights: Path) -> Run:
    """Run the command on small weights, for a few tokens: `(exit code, stdout, stderr)`."""

    def run(*words: str | Path) -> tuple[int, str, str]:
        settings = ("--max-new-tokens", "12", "--device", "cpu")
        with pytest.raises(SystemExit) as end:
            run_command(command, "generate", [*map(str, ("--weights", weights, *settings, *words))])
        out, err = capsys.readouterr()
        return int(end.value.code or 0), out, err

    return run


def document(run: Run, *words: str | Path) -> dict[str, Any]:
    code, out, err = run("--json", *words)
    assert code == 0, err
    return json.loads(out)  # type: ignore[no-any-return]


def test_the_printed_text_equals_that_in_the_json_document(run: Run, weights: Path) -> None:
    (result,) = document(run, "--prompt", "The rain")["results"]
    code, out, err = run("--prompt", "The rain")
    assert (code, out) == (0, result["text"] + "\n")
    assert "--max-new-tokens 12 reached" in err
    tokenizer = Tokenizer.load(SHIPPED_TOKENIZER)
    prompt = [tokenizer.bos_id, *tokenizer.encode("The rain")]
    decoding = Decoding(max_new_tokens=12)
    (expected,) = generate(load_model(weights), [prompt], decoding, eos_id=tokenizer.eos_id)
    assert result["tokens"] == list(expected.tokens)
    assert "The rain" + result["text"] == tokenizer.decode([*prompt, *expected.tokens])


def test_a_character_is_printed_when_all_of_its_bytes_are_there(capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = Tokenizer.load(SHIPPED_TOKENIZER)
    ids = tokenizer.encode("a☃b")
    new = [ids[: count + 1] for count in range(len(ids))]
    shown = []
    with _streamed(tokenizer, [tokenizer.bos_id]) as show:
        for tokens in new:
            show([tuple(tokens)])
            shown.append(capsys.readouterr().out)
    assert [text for text in shown if text] == ["a", "☃", "b"]
    assert len(shown) == 5  # the snowman has three bytes, which are tokens of their own


def test_several_prompts_are_printed_each_with_its_text(run: Run) -> None:
    results = document(run, "--prompt", "One", "--prompt", "Two three", "--beams", "2")["results"]
    _, out, _ = run("--prompt", "One", "--prompt", "Two three", "--beams", "2")
    assert out == "".join(f"{result['prompt']}\n{result['text']}\n\n" for result in results)


def test_an_instruction_is_put_into_the_template_of_alpaca(run: Run) -> None:
    results = document(run, "--prompt", "x", "--instruction", "Add.", "--input", "1 and 2")["results"]
    assert [result["prompt"] for result in results] == ["x", Instruction("Add.", "1 and 2", "").prompt]


def test_an_adapter_changes_the_text(run: Run, weights: Path, tmp_path: Path) -> None:
    model = load_model(weights)
    adapt(model, ["layers.1.attention.wv"], r=4, alpha=8.0, dropout=0.5)
    layer = model.layers[1].attention.wv
    assert isinstance(layer, LoRALinear)
    with torch.no_grad():
        layer.lora_b.normal_()
    save_adapter(model, tmp_path / "adapter")
    (adapted,) = document(run, "--prompt", "x", "--adapter", tmp_path / "adapter")["results"]
    (plain,) = document(run, "--prompt", "x")["results"]
    tokenizer = Tokenizer.load(SHIPPED_TOKENIZER)
    prompt = [tokenizer.bos_id, *tokenizer.encode("x")]
    (expected,) = generate(model, [prompt], Decoding(max_new_tokens=12), eos_id=tokenizer.eos_id)
    assert adapted["tokens"] == list(expected.tokens) != plain["tokens"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "no text to continue: give one with --prompt or --instruction"),
        (["--prompt", " "], '--prompt " " is empty'),
        (["--instruction", ""], '--instruction "" is empty'),
        (["--prompt", "x", "--input", "y"], "--input needs exactly one --instruction, but 0 are given"),
        (["--prompt", "word " * 600], "leaves no room in the context (max_seq_len) of 512"),
        (["--prompt", "x", "--top-p", "1.5"], "top_p=1.5: expected a share"),
        (["--prompt", "x", "--beams", "0"], "beams=0: expected"),
        (["--prompt", "x", "--beams", "many"], 'setting "beams" cannot be "many": expected a whole number'),
        (["--prompt", "x", "--beams", "2", "--temperature", "1"], "beams=2 with temperature=1.0"),
        (["--prompt", "x", "--set", "vocab_size=2048"], "its vocabulary has 1024 tokens, but the model's has 2048"),
        (["--prompt", "x", "--tokenizer", "nowhere.model"], "tokenizer nowhere.model: no such file"),
        (["--prompt", "x", "dtipe=bf16"], 'has no setting "dtipe": did you mean "dtype"?'),
        (["--prompt", "x", "--device", "gpu"], 'unknown device "gpu": did you mean "cpu"?'),
        (["--prompt", "x", "--weights", "nowhere"], "Directory 'nowhere' does not exist"),
    ],
)
def test_invalid_options_are_refused_with_one_message(run: Run, words: list[str], told: str) -> None:
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert told in err
    assert "Traceback" not in err


def test_weights_without_a_tokenizer_ask_for_it(run: Run, tmp_path: Path) -> None:
    bare = saved(tmp_path / "bare", "meta")
    code, _, err = run("--prompt", "x", "--weights", bare)
    assert code == 2
    assert "the folder has no tokenizer.model: name the tokenizer with --tokenizer FILE" in err
    assert run("--prompt", "x", "--weights", bare, "--tokenizer", SHIPPED_TOKENIZER)[0] == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_reported(run: Run) -> None:
    code, _, err = run("--prompt", "x", "--device", "cuda")
    assert code == 2
    assert "PyTorch finds no GPU on this machine" in err
