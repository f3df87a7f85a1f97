"""The LLaMA2 target on the real Alpaca samples and the real tokenizer, if they are next to the project."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from published_runs import SAMPLE_LENGTHS

from memscope.targets.llama2 import alpaca
from memscope.targets.llama2.alpaca import Instruction, Sample
from memscope.targets.llama2.target import PRESETS, build
from memscope.targets.training.tokenizer import Tokenizer

# Their licences do not allow them inside the project.
SHARED = Path(__file__).parents[2].parent / "shared"
DATA = SHARED / "data" / "alpaca_200.json"
TOKENIZER = SHARED / "data" / "llama2_tokenizer.model"

pytestmark = pytest.mark.skipif(
    not (DATA.is_file() and TOKENIZER.is_file()), reason=f"the real data are not there: {DATA}, {TOKENIZER}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(TOKENIZER)


@pytest.fixture(scope="module")
def rows() -> list[Instruction]:
    return alpaca.load(DATA, 200)


@pytest.fixture(scope="module")
def samples(rows: list[Instruction], tokenizer: Tokenizer) -> list[Sample]:
    return [alpaca.encode(row, tokenizer) for row in rows]


def test_lengths_are_those_of_the_published_runs(samples: list[Sample]) -> None:
    assert tuple(len(sample.tokens) for sample in samples) == SAMPLE_LENGTHS


def test_labels_begin_where_the_response_begins(
    rows: list[Instruction], samples: list[Sample], tokenizer: Tokenizer
) -> None:
    shared_pieces = 0
    for row, sample in zip(rows, samples, strict=True):
        masked = sample.labels.count(alpaca.IGNORED)
        assert sample.labels == (alpaca.IGNORED,) * masked + sample.tokens[masked:]
        assert tokenizer.decode(list(sample.tokens)) == row.prompt + row.output
        given = tokenizer.decode(list(sample.tokens[:masked]))
        # ":-" and ":[" are single pieces: then, and only then, the mask reaches one character into the response.
        shared = row.output[0] if given != row.prompt else ""
        assert given == row.prompt + shared
        assert shared in ("", "-", "[")
        shared_pieces += bool(shared)
    starts_so = sum(row["output"][0] in "-[" for row in json.loads(DATA.read_text(encoding="utf-8")))
    assert shared_pieces == starts_so


def test_the_first_step_ends_with_the_longest_sample_and_25_steps_cover_the_data() -> None:
    config = dataclasses.replace(
        PRESETS["debug"], vocab_size=32000, data=str(DATA), tokenizer=str(TOKENIZER), n_layers=1
    )
    workload = build(config)
    assert len(workload.batches) == 25
    lengths = [[len(sample.tokens) for sample in step] for step in workload.batches]
    assert lengths[0][-1] == 405
    assert sum(map(sum, lengths)) == 24_200  # 200 × 121.0
