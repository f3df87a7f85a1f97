"""Instruction data of the LLaMA2 target: templates, labels, micro-batches, and invalid input."""

from __future__ import annotations

import dataclasses
import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from sentencepiece import SentencePieceProcessor

from memscope.errors import UsageError
from memscope.targets.llama2 import alpaca
from memscope.targets.llama2.alpaca import Instruction, Sample
from memscope.targets.llama2.target import PRESETS, SHIPPED_DATA, SHIPPED_TOKENIZER, Config, build
from memscope.targets.training.tokenizer import Tokenizer

DEBUG = PRESETS["debug"]
ROW = {"instruction": "Say it.", "input": "", "output": "It."}
PROJECT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(SHIPPED_TOKENIZER)


@pytest.fixture
def written(tmp_path: Path) -> Any:
    def write(content: Any) -> str:
        path = tmp_path / "rows.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return str(path)

    return write


# Shipped files


def test_shipped_data_has_one_long_sample_and_fits_the_debug_context(tokenizer: Tokenizer) -> None:
    samples = [alpaca.encode(row, tokenizer) for row in alpaca.load(SHIPPED_DATA, 1000)]
    lengths = sorted(len(sample.tokens) for sample in samples)
    assert len(lengths) >= 60
    # The longest sample of the real data has 405 tokens, the average 121; the shipped data resembles it.
    assert 380 <= lengths[-1] <= 430
    assert 100 <= sum(lengths) / len(lengths) <= 140
    assert lengths[-1] <= DEBUG.max_seq_len


def test_shipped_data_uses_both_templates() -> None:
    rows = alpaca.load(SHIPPED_DATA, 1000)
    assert min(sum(bool(row.input) for row in rows), sum(not row.input for row in rows)) >= 10
    assert len({(row.instruction, row.input) for row in rows}) == len(rows)


def test_shipped_tokenizer_has_llamas_special_ids_and_knows_every_byte(tokenizer: Tokenizer) -> None:
    pieces = tokenizer.pieces
    assert (pieces.unk_id(), tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    assert tokenizer.vocab_size == DEBUG.vocab_size
    assert [pieces.id_to_piece(3 + byte) for byte in range(256)] == [f"<0x{byte:02X}>" for byte in range(256)]
    for text in ("plain", "漢字 and é\n\n\ttabs", "  two  spaces", "2+2=4"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_script_trains_the_shipped_tokenizer_from_the_shipped_text() -> None:
    trained = SentencePieceProcessor(
        model_proto=runpy.run_path(str(PROJECT / "scripts" / "make_llama2_data.py"))["train"]()
    )
    shipped = SentencePieceProcessor(model_file=str(SHIPPED_TOKENIZER))
    ids = range(trained.get_piece_size())
    assert [trained.id_to_piece(i) for i in ids] == [shipped.id_to_piece(i) for i in ids]


# Samples


def test_prompt_without_input_is_alpacas() -> None:
    assert Instruction("Name a {colour}.", "", "Red").prompt == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n"
        "\n### Instruction:\nName a {colour}.\n\n### Response:"
    )


def test_prompt_with_input_is_alpacas() -> None:
    assert Instruction("Translate.", "one {two}", "eins").prompt == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n"
        "\n### Instruction:\nTranslate.\n\n### Input:\none {two}\n\n### Response:"
    )


def test_labels_are_masked_exactly_over_the_prompt(tokenizer: Tokenizer) -> None:
    for row in alpaca.load(SHIPPED_DATA, 1000):
        sample = alpaca.encode(row, tokenizer)
        given, learned = sample.tokens[: sample.prompt_tokens], sample.tokens[sample.prompt_tokens :]
        assert sample.labels == (-100,) * len(given) + learned
        assert given[0] == tokenizer.bos_id
        assert learned[-1] == tokenizer.eos_id
        assert tokenizer.decode(list(given)) == row.prompt
        assert tokenizer.decode(list(sample.tokens)) == row.prompt + row.output


def test_collator_pads_on_the_right_and_gives_padding_no_label() -> None:
    batch = alpaca.collate([Sample((1, 5, 6, 2), 2), Sample((1, 7, 2), 1)])
    assert batch["tokens"].tolist() == [[1, 5, 6, 2], [1, 7, 2, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 6, 2], [-100, 7, 2, -100]]
    assert batch["tokens"].dtype == batch["labels"].dtype == torch.int64


def test_the_first_longest_sample_comes_first_and_the_others_keep_their_order() -> None:
    samples = [Sample((1,) * n, i) for i, n in enumerate([3, 5, 2, 5])]
    assert [sample.prompt_tokens for sample in alpaca.longest_first(samples)] == [1, 0, 2, 3]


# Steps


def test_the_first_of_the_default_steps_ends_with_the_longest_sample() -> None:
    workload = build(DEBUG)
    lengths = [len(sample.tokens) for step in workload.batches for sample in step]
    assert workload.plan.micro_batches == 8
    assert len(workload.batches) == 8
    assert lengths[7] == max(lengths)
    pieces = workload.split(workload.batches[0], 8)
    assert [piece["tokens"].shape for piece in pieces] == [(1, length) for length in lengths[:8]]


def test_a_step_of_one_micro_batch_is_padded_to_its_longest_sample() -> None:
    workload = build(DEBUG)
    [whole] = workload.split(workload.batches[0], 1)
    longest = max(len(sample.tokens) for sample in workload.batches[0])
    assert whole["tokens"].shape == (8, longest)


def test_weight_is_the_number_of_tokens_that_are_predicted_and_labelled() -> None:
    workload = build(DEBUG)
    # The first token is never predicted, so its label does not count.
    batch = alpaca.collate([Sample((1, 5, 6, 2), 0), Sample((1, 7, 2), 2)])
    assert workload.weight(batch) == 3 + 1


def test_too_few_samples_for_a_step_are_used_again(written: Any) -> None:
    rows = [ROW | {"output": word} for word in ("one", "two", "three")]
    workload = build(dataclasses.replace(DEBUG, data=written(rows), micro_batch=2, accumulation=2))
    [step] = workload.batches
    assert len(step) == 4
    assert step[2] == step[3]  # the first sample is used again; as the longest it also ends the first step
    assert len(set(step)) == 3


def test_only_the_first_samples_are_read(written: Any) -> None:
    workload = build(dataclasses.replace(DEBUG, data=written([ROW, ROW, {"broken": 1}]), samples=2, accumulation=1))
    assert len(workload.batches) == 2


@pytest.mark.parametrize("seq_len", [16, 500])
def test_seq_len_gives_every_sample_that_length_with_all_tokens_as_targets(seq_len: int) -> None:
    workload = build(dataclasses.replace(DEBUG, seq_len=seq_len))
    [whole] = workload.split(workload.batches[0], 1)
    assert whole["tokens"].shape == (8, seq_len)
    assert torch.equal(whole["labels"], whole["tokens"])
    assert workload.weight(whole) == 8 * (seq_len - 1)


def test_settings_are_the_configuration() -> None:
    assert build(DEBUG).settings == json.loads(json.dumps(dataclasses.asdict(DEBUG)))


# Invalid input


def message(**changes: Any) -> str:
    with pytest.raises(UsageError) as caught:
        build(dataclasses.replace(DEBUG, **changes))
    return str(caught.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("not json {", ["not JSON", "line 1", "--set data="]),
        ('{"a": 1}\n{"b": 2}', ["not JSON", "line 2", "JSON list"]),
        ({"instruction": "x"}, ["holds a JSON object", "expected a JSON list"]),
        ([], ["list is empty", "nothing to train on"]),
        ([ROW, "text"], ["row 1", "a JSON text, expected an object", "instruction, input, output"]),
        ([ROW, ROW, {"instruction": "x", "input": ""}], ["row 2", 'missing field "output"', "instruction, input"]),
        ([{"instruction": "x", "output": "y"}], ["row 0", 'missing field "input"', "empty text"]),
        ([ROW | {"output": 3}], ["row 0", '"output" is a JSON number', "expected text"]),
        ([ROW | {"input": None}], ["row 0", '"input" is a JSON null', "expected text"]),
        ([ROW, ROW | {"output": " \n"}], ["row 1", '"output" is empty', "remove the row"]),
        ([ROW | {"instruction": ""}], ["row 0", '"instruction" is empty']),
    ],
)
def test_data_that_cannot_be_used_is_named_with_its_row(written: Any, content: Any, expected: list[str]) -> None:
    path = written(content)
    text = message(data=path)
    for part in [path, *expected]:
        assert part in text


def test_missing_data_is_named(tmp_path: Path) -> None:
    assert f"data {tmp_path / 'none.json'}: no such file" in message(data=str(tmp_path / "none.json"))
    assert "cannot be read (Is a directory)" in message(data=str(tmp_path))


def test_data_in_another_encoding_is_not_json(tmp_path: Path) -> None:
    path = tmp_path / "latin.json"
    path.write_bytes(json.dumps([ROW | {"output": "Züge"}], ensure_ascii=False).encode("latin-1"))
    assert "not JSON ('utf-8' codec can't decode" in message(data=str(path))


def test_a_sample_longer_than_the_context_is_named_with_its_row_and_length(written: Any, tokenizer: Tokenizer) -> None:
    path = written([ROW, ROW, ROW | {"output": "word " * 600}])
    length = len(alpaca.encode(alpaca.load(path, 3)[2], tokenizer).tokens)
    text = message(data=path)
    assert f"{path}, row 2: the sample has {length} tokens, but the context (max_seq_len) is 512" in text
    assert f"--set max_seq_len={length}" in text
    build(dataclasses.replace(DEBUG, data=path, max_seq_len=length))
    build(dataclasses.replace(DEBUG, data=path, seq_len=512))


def test_missing_tokenizer_is_named(tmp_path: Path) -> None:
    text = message(tokenizer=str(tmp_path / "none.model"))
    assert f"tokenizer {tmp_path / 'none.model'}: no such file" in text
    assert "--set tokenizer=PATH" in text
    assert f"tokenizer {tmp_path}: is a folder" in message(tokenizer=str(tmp_path))


@pytest.mark.parametrize(
    "content", [b"", b"no model", SHIPPED_TOKENIZER.read_bytes()[:4000]], ids=["empty", "text", "cut"]
)
def test_broken_tokenizer_is_refused_with_the_reason(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.model"
    path.write_bytes(content)
    assert f"tokenizer {path}: not a SentencePiece model, or damaged (" in message(tokenizer=str(path))


def test_a_vocabulary_larger_than_the_models_is_refused_with_the_setting_to_change() -> None:
    text = message(vocab_size=1000)
    assert "has 1024 tokens, but the model's (vocab_size) has 1000" in text
    assert "--set vocab_size=1024" in text
    build(dataclasses.replace(DEBUG, vocab_size=2048))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"n_layers": 0}, "n_layers=0: expected a whole number from 1"),
        ({"micro_batch": -1}, "micro_batch=-1: expected a whole number from 1"),
        ({"samples": 0}, "samples=0: expected a whole number from 1"),
        ({"dim": 4095}, "dim must be a multiple of 64"),
        ({"dim": 32 * 3}, "dim must be a multiple of 64"),
        ({"n_kv_heads": 5}, "n_kv_heads=5: expected a divisor of n_heads=32"),
        ({"n_kv_heads": 0}, "n_kv_heads=0: expected a whole number from 1"),
        ({"attention": "flash"}, 'attention="flash": Valid: eager, sdpa'),
        ({"attention": "spda"}, 'did you mean "sdpa"?'),
        ({"dtype": "fp16"}, 'did you mean "bf16"?'),
        ({"norm_eps": 0.0}, "norm_eps=0.0: expected a number above 0"),
        ({"ffn_dim_multiplier": float("nan")}, "ffn_dim_multiplier=nan: expected a number above 0"),
        ({"lr": -1e-5}, "lr=-1e-05: expected 0 or more"),
        ({"seq_len": 1}, "seq_len=1: expected 2 to max_seq_len=4096"),
        ({"seq_len": 5000}, "seq_len=5000: expected 2 to max_seq_len=4096"),
    ],
)
def test_an_invalid_value_is_named_with_the_expected_one(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(UsageError) as caught:
        Config(**changes)
    assert expected in str(caught.value)


def test_every_problem_is_reported_at_once() -> None:
    with pytest.raises(UsageError) as caught:
        Config(n_heads=0, n_kv_heads=-1, attention="x", dtype="y", lr=-1.0)
    assert len(str(caught.value).splitlines()) == 1 + 5
