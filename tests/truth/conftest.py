"""One small tokenizer, trained once."""

from __future__ import annotations

from pathlib import Path

import pytest

from ludus.text.tokenizer import Tokenizer
from ludus.text.train_tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def kuhn_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    texts = [
        "You are player 0. Your card: K. Moves: pass bet.\nLegal: pass bet",
        "I hold a high card.\\boxed{bet}",
        "I hold a low card.\\boxed{pass}",
    ]
    out: Path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(texts * 5, out, 400)
    return Tokenizer.load(out)
