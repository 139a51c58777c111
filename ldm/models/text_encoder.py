"""The text encoder: prompts to the tokens that Stable Diffusion's UNet attends to.

Dimensions: B batch · L tokens (77) · D tower width (768).
Source: Rombach et al. 2022; the tower is CLIP's (Radford et al. 2021), its output the last normed hidden state.
"""

import warnings
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.config import TextEncoderConfig
from ldm.files import UserError
from ldm.models.clip import TextTower

TOKENIZER_FILES = ("vocab.json", "merges.txt")


class TextEncoder(nn.Module):
    """CLIP's text tower and its tokenizer."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.folder = Path(config.tokenizer) if config.tokenizer else None
        self.transformer = TextTower(config)

    def forward(self, token_ids: Tensor) -> Tensor:
        """Encode token ids (B, L) int64 as (B, L, D)."""
        return self.transformer(token_ids)

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Tokenize prompts as (B, L) int64: start, at most L - 2 tokens, end, and the end again up to L.

        Longer prompts are cut, with a warning except in training. A missing or wrong tokenizer is a UserError.
        """
        length = self.config.max_length
        ids = self.tokenizer(list(prompts), padding="max_length", max_length=length)["input_ids"]
        for prompt, row in zip(prompts, ids, strict=True):
            if len(row) > length and not self.training:
                warnings.warn(f"{prompt!r}: {len(row)} tokens, cut to the first {length}", stacklevel=3)
        return torch.tensor([[*row[: length - 1], row[-1]] for row in ids])

    @cached_property
    def tokenizer(self) -> Any:
        """Byte-pair encoding of lower-case text, from `vocab.json` and `merges.txt`."""
        folder = self.folder or Path("tokenizer")
        if not _holds_tokenizer(folder):
            raise UserError(
                f"{folder}: got no tokenizer there, expected {' and '.join(TOKENIZER_FILES)} (on the hub: openai/"
                "clip-vit-large-patch14) in `tokenizer` beside the checkpoint, or in model.text_encoder.tokenizer"
            )
        from transformers import CLIPTokenizer

        try:
            tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # a damaged file raises exceptions of several libraries
            raise UserError(f"{folder}: not a readable tokenizer ({error}); download its files again") from error
        if len(tokenizer) != self.config.vocab_size:
            sizes = f"{len(tokenizer)} tokens, expected {self.config.vocab_size}"
            raise UserError(f"{folder}: got a tokenizer of {sizes}; take the one that the text tower was trained with")
        return tokenizer

    def find_tokenizer(self, folder: Path) -> Path:
        """Use the tokenizer in a checkpoint's folder, or in its subfolder `tokenizer`, unless the config names one."""
        if self.folder is None:
            self.folder = folder if _holds_tokenizer(folder) else folder / "tokenizer"
        return self.folder


def _holds_tokenizer(folder: Path) -> bool:
    return all((folder / name).is_file() for name in TOKENIZER_FILES)
