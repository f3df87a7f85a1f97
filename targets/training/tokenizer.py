"""A SentencePiece model from a file, with the ids that LLaMA2 puts around every sample."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from memscope.errors import UsageError

__all__ = ["TOKENIZER", "Tokenizer", "tokenizer_beside"]

TOKENIZER = "tokenizer.model"
"""File name of the tokenizer in a folder of weights, as published by Meta and Hugging Face."""


def tokenizer_beside(weights: Path) -> Path:
    """The tokenizer in a folder of weights: weights are of no use with the ids of another tokenizer.

    Raises:
        UsageError: the folder does not exist or has no tokenizer.
    """
    path = weights / TOKENIZER
    if not weights.is_dir():
        raise UsageError(f"weights {weights}: no such folder: expected one with weights and {TOKENIZER}")
    if not path.is_file():
        raise UsageError(f"weights {weights}: the folder has no {TOKENIZER}: name the tokenizer with --tokenizer FILE")
    return path


@dataclass(frozen=True)
class Tokenizer:
    """Converts text to token ids and back."""

    pieces: SentencePieceProcessor
    vocab_size: int
    bos_id: int
    """Id of the token that begins every sample."""
    eos_id: int
    """Id of the token that ends every sample."""

    @classmethod
    def load(cls, path: str | Path, vocab_size: int | None = None) -> Tokenizer:
        """Read a SentencePiece model file.

        Args:
            path: the file.
            vocab_size: vocabulary size of the weights; a tokenizer of another size is refused.

        Raises:
            UsageError: the file is missing, is not a SentencePiece model, has no BOS or EOS token, or has another
                vocabulary size.
        """
        path = Path(path)
        wanted = (
            "expected a SentencePiece model such as LLaMA2's tokenizer.model; choose a file with --set tokenizer=PATH"
        )
        if not path.is_file():
            raise UsageError(f"tokenizer {path}: {'is a folder' if path.is_dir() else 'no such file'}; {wanted}")
        try:
            pieces = SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise UsageError(f"tokenizer {path}: not a SentencePiece model, or damaged ({error}); {wanted}") from None
        if pieces.bos_id() < 0 or pieces.eos_id() < 0:
            raise UsageError(f"tokenizer {path}: no token begins (BOS) or ends (EOS) a sample; {wanted}")
        found = cls(pieces, pieces.get_piece_size(), pieces.bos_id(), pieces.eos_id())
        if vocab_size is not None and found.vocab_size != vocab_size:
            raise UsageError(
                f"tokenizer {path}: its vocabulary has {found.vocab_size} tokens, but the model's has {vocab_size}: "
                "this is another model's tokenizer; name the right one with --tokenizer FILE"
            )
        return found

    def encode(self, text: str) -> list[int]:
        """Convert a text to token ids, without BOS and EOS."""
        ids: list[int] = self.pieces.encode(text)
        return ids

    def decode(self, ids: list[int]) -> str:
        """Convert token ids to text, without BOS and EOS."""
        text: str = self.pieces.decode(ids)
        return text
