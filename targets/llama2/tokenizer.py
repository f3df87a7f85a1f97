"""A SentencePiece model by path, with the ids that LLaMA2 puts around every sample."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from memscope.errors import UsageError

__all__ = ["TOKENIZER", "Tokenizer", "tokenizer_beside"]

TOKENIZER = "tokenizer.model"
"""The tokenizer in a folder of weights, as Meta and Hugging Face call it."""


def tokenizer_beside(weights: Path) -> Path:
    """The tokenizer in a folder of weights: on the ids of another one they know nothing.

    Raises:
        UsageError: when there is none, or no such folder.
    """
    path = weights / TOKENIZER
    if not weights.is_dir():
        raise UsageError(f"weights {weights}: there is no such folder: expected one with weights and {TOKENIZER}")
    if not path.is_file():
        raise UsageError(
            f"weights {weights}: there is no {TOKENIZER} with them: name their tokenizer with --tokenizer FILE"
        )
    return path


@dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back."""

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
            vocab_size: that of the weights it is used with; one of another size is refused.

        Raises:
            UsageError: when the file is missing, is no SentencePiece model, has no BOS or EOS token, or is of another
                vocabulary.
        """
        path = Path(path)
        wanted = "expected a SentencePiece model such as LLaMA2's tokenizer.model; name one with --set tokenizer=PATH"
        if not path.is_file():
            raise UsageError(f"tokenizer {path}: {'a folder' if path.is_dir() else 'no such file'}; {wanted}")
        try:
            pieces = SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise UsageError(f"tokenizer {path}: not a SentencePiece model, or damaged ({error}); {wanted}") from None
        if pieces.bos_id() < 0 or pieces.eos_id() < 0:
            raise UsageError(f"tokenizer {path}: it has no token that begins (BOS) or ends (EOS) a sample; {wanted}")
        found = cls(pieces, pieces.get_piece_size(), pieces.bos_id(), pieces.eos_id())
        if vocab_size is not None and found.vocab_size != vocab_size:
            raise UsageError(
                f"tokenizer {path}: its vocabulary has {found.vocab_size} tokens, the model's {vocab_size}: "
                "it is of another model; name the right one with --tokenizer FILE"
            )
        return found

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without BOS and EOS."""
        ids: list[int] = self.pieces.encode(text)
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of token ids; BOS and EOS leave no trace in it."""
        text: str = self.pieces.decode(ids)
        return text
