"""Fine-tune a mixture-of-experts model that one call has optimized.

python examples/finetune.py                          # writes a small model, and trains that
python examples/finetune.py --model PATH --text notes.txt --save build/mine
torchrun --nproc-per-node 2 examples/finetune.py     # each rank owns half of the experts

The result is an ordinary checkpoint: plain transformers loads it, and gives the same logits.
"""

import argparse
import os
import sys
from pathlib import Path
from pydoc_data.topics import topics
from statistics import fmean
from typing import Any

import torch
import torch.distributed as dist
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    get_cosine_schedule_with_warmup,
)

import moe_compile

RANK, RANKS = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", "0"))
LOCAL_RANKS = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
DEVICE = "cuda" if torch.cuda.device_count() >= LOCAL_RANKS else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
TOLERANCE = 5e-2 if DTYPE is torch.bfloat16 else 1e-5
DEMO_FALL = 0.3
VOCABULARY = 1024
END = "<|endoftext|>"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fine-tune a mixture-of-experts model.")
    parser.add_argument("--model", type=Path, help="a causal LM's folder; none: a small new one")
    parser.add_argument("--text", type=Path, help="what to learn; none: Python's own manual")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--batch", type=int, default=8, help="rows a step, over all ranks")
    parser.add_argument("--length", type=int, default=128, help="tokens a row")
    parser.add_argument("--lr", type=float, help="none: 3e-3 for the small new model, else 1e-5")
    parser.add_argument("--prompt", default='The "for" statement')
    parser.add_argument("--work", type=Path, default=Path("build/qwen3-moe-tiny"))
    parser.add_argument("--save", type=Path, default=Path("build/finetuned"))
    return parser.parse_args()


def say(*text: object) -> None:
    if RANK == 0:
        print(*text, flush=True)


def join_ranks() -> DeviceMesh | None:
    """The processes that torchrun started, which share out the experts; None for one process."""
    if RANKS == 1:
        return None
    if DEVICE == "cuda":
        torch.cuda.set_device(LOCAL_RANK)
    return init_device_mesh(DEVICE, (RANKS,), mesh_dim_names=("ep",))


def make_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE of the text's commonest pieces; it can spell every other text too."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[END],
        show_progress=False,
    )
    bpe.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END)


def write_small_model(folder: Path, text: str) -> None:
    """Write an untrained Qwen3-MoE checkpoint of 11 million parameters."""
    tokenizer = make_tokenizer(text)
    tokenizer.save_pretrained(folder)
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        moe_intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=16,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        max_position_embeddings=1024,
        initializer_range=0.05,
        eos_token_id=tokenizer.convert_tokens_to_ids(END),
    )
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(config).save_pretrained(folder)


def load(folder: Path) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPE)
    return model.to(DEVICE)  # pyright: ignore[reportArgumentType] transformers types it wrongly


def train(model: PreTrainedModel, tokens: Tensor, args: argparse.Namespace) -> list[float]:
    """Train on random windows of the text; return the loss of every step."""
    torch.manual_seed(RANK)  # every rank has other data
    rows_a_rank = max(args.batch // RANKS, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, args.steps // 10, args.steps)
    windows = tokens.unfold(0, args.length, 1)
    losses: list[float] = []
    model.train()
    total = args.steps * rows_a_rank * RANKS * args.length
    with tqdm(total=total, unit="tok", unit_scale=True, disable=RANK > 0) as bar:
        for _ in range(args.steps):
            rows = windows[torch.randint(len(windows), (rows_a_rank,))].to(DEVICE)
            loss = model(input_ids=rows, labels=rows, use_cache=False).loss
            loss.backward()
            moe_compile.clip_grad_norm_(model, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(mean_over_ranks(loss))
            bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
            bar.update(rows.numel() * RANKS)
    model.eval()
    return losses


def mean_over_ranks(loss: Tensor) -> float:
    mean = loss.detach() / RANKS
    if RANKS > 1:
        dist.all_reduce(mean)
    return mean.item()


@torch.no_grad()
def matches_plain_model(model: PreTrainedModel, folder: Path, rows: Tensor) -> bool:
    """Load the folder in plain transformers and compare its logits with the model's."""
    expected = load(folder)(input_ids=rows, use_cache=False).logits
    difference = model(input_ids=rows, use_cache=False).logits - expected
    error = (difference.norm() / expected.norm()).item()
    say(
        f"logits in plain transformers: largest difference {difference.abs().max().item():.1e}, "
        f"relative error {error:.1e} (at most {TOLERANCE:.0e})"
    )
    return error <= TOLERANCE


def main() -> str | None:
    args = parse_args()
    text = args.text.read_text(encoding="utf-8") if args.text else "\n\n".join(topics.values())
    args.lr = args.lr or (1e-5 if args.model else 3e-3)
    # The weights are written last, so a folder that has them is whole.
    if RANK == 0 and not args.model and not (args.work / "model.safetensors").exists():
        write_small_model(args.work, text)
    mesh = join_ranks()
    if mesh is not None:
        dist.barrier()

    source: Path = args.model or args.work
    tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(source)
    model = moe_compile.optimize(load(source), mesh)
    say(moe_compile.report(model))

    tokens = torch.tensor(tokenizer.encode(text, verbose=False))
    losses = train(model, tokens, args)
    last = fmean(losses[-10:])
    say(f"loss: {losses[0]:.3f} at first, {last:.3f} over the last 10 steps")

    model.save_pretrained(args.save)
    if RANK == 0:
        tokenizer.save_pretrained(args.save)
    same = matches_plain_model(model, args.save, tokens[None, : args.length].to(DEVICE))

    prompt = tokenizer(args.prompt, return_tensors="pt").to(DEVICE)
    generate: Any = model.generate  # PreTrainedModel does not declare it
    written = generate(**prompt, max_new_tokens=100, do_sample=True, temperature=0.7)
    say(tokenizer.decode(written[0], skip_special_tokens=True))

    if mesh is not None:
        dist.destroy_process_group()
    if not same:
        return "the saved model does not give the same logits"
    if not args.model and last > (1 - DEMO_FALL) * losses[0]:
        return f"the loss fell by less than {DEMO_FALL:.0%}"
    return None


if __name__ == "__main__":
    sys.exit(main())
