"""The losses of three steps in TRL's SFTTrainer."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from tests.pairs import token_ids
from tests.trainers import ARGUMENTS, logs_of


def trl_losses(model: Any) -> list[float]:
    """The losses alone."""
    with tempfile.TemporaryDirectory() as folder:
        return [entry["loss"] for entry in logs_of(trl_trainer_of(model, Path(folder)))]


def trl_trainer_of(
    model: Any, folder: Path, *, kind: Callable[..., SFTTrainer] = SFTTrainer, **options: Any
) -> SFTTrainer:
    """SFTTrainer, on text, which it tokenizes itself."""
    words = Tokenizer(models.WordLevel({str(i): i for i in range(128)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="0", eos_token="1", unk_token="0"
    )
    rows = token_ids(12 if options else 6, 10)
    data: Any = Dataset.from_dict({"text": [" ".join(map(str, row.tolist())) for row in rows]})
    arguments = SFTConfig(str(folder), bf16=False, **ARGUMENTS | options)
    return kind(model, arguments, train_dataset=data, eval_dataset=data, processing_class=tokenizer)
