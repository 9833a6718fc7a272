"""The losses of three steps in TRL's SFTTrainer."""

import tempfile
from typing import Any

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from tests.pairs import token_ids
from tests.trainers import ARGUMENTS, losses_of


def trl_losses(model: Any) -> list[float]:
    """With TRL's SFTTrainer, on text, which it tokenizes itself."""
    words = Tokenizer(models.WordLevel({str(i): i for i in range(128)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="0", eos_token="1", unk_token="0"
    )
    texts = [" ".join(map(str, row.tolist())) for row in token_ids(6, 10)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(folder, bf16=False, **ARGUMENTS)
        data: Any = Dataset.from_dict({"text": texts})
        return losses_of(
            SFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer)
        )
