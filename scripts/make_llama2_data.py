"""Train the small tokenizer that `targets/llama2` ships, on the text that it ships.

    python scripts/make_llama2_data.py [OUTPUT]

The settings that determine how text is split are those of LLaMA2's tokenizer: byte-pair encoding, separate digits,
bytes for unknown characters, no normalization; ids 0, 1, 2 for unknown, BOS, EOS. The vocabulary has 1,024 pieces
instead of 32,000. The same text and the same version of SentencePiece produce the same file.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

import sentencepiece

from memscope.targets.llama2 import alpaca
from memscope.targets.llama2.target import SHIPPED_DATA, SHIPPED_TOKENIZER

VOCAB_SIZE = 1024


def train() -> bytes:
    """Train the tokenizer; return the content of its model file."""
    rows = alpaca.load(SHIPPED_DATA, limit=sys.maxsize)
    # Line by line, so that a newline has no piece of its own and becomes the byte <0x0A>, as in LLaMA2's tokenizer.
    lines = [line for row in rows for line in (row.prompt + row.output).splitlines() if line]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        character_coverage=0.9995,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=1,
    )
    return model.getvalue()


if __name__ == "__main__":
    output = Path(sys.argv[1]) if len(sys.argv) > 1 else SHIPPED_TOKENIZER
    output.write_bytes(train())
    print(f"{output}: {VOCAB_SIZE} pieces, {output.stat().st_size:,} bytes")
