"""Trains the demo model: a byte-level BPE of 4096 tokens and a Llama of 5.5M parameters, on text that ships with Python.

Run as `python -m hf_accel.demo.train --minutes 35 --out FOLDER`. Needs no network. A usable model is saved every few
minutes, so that stopping early leaves one. Does not know hf_accel's engine.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_accel.demo.corpus import BOS, CHAT_TEMPLATE, EOS, PAD, documents

VOCAB_SIZE = 4096
CONTEXT = 1024
BATCH_TOKENS = 2048
PEAK_LR = 2.5e-3
WARMUP = 0.03
CHECKPOINT_SECONDS = 240.0


def train_tokenizer(texts: Sequence[str], vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """Byte-level BPE over `texts`, with bos put before every text and a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A fresh Llama: 6 layers, hidden 256, 8 query heads on 4 key/value heads, tied embeddings."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


class Stream:
    """The corpus as one row of token ids `bos document eos bos document eos ...`, and windows drawn from it."""

    def __init__(self, texts: Sequence[str], tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        ids: list[int] = []
        starts: list[int] = []
        for document in tokenizer(list(texts), verbose=False)["input_ids"]:
            starts.append(len(ids))
            ids += [*document, tokenizer.eos_token_id]
        self.ids = torch.tensor(ids)  # [num_tokens]
        self.starts = torch.tensor(starts)  # [num_documents]
        self._generator = torch.Generator().manual_seed(seed)

    def batch(self, num_tokens: int, length: int) -> torch.Tensor:
        """Windows `[num_tokens // length, length]`, half of them starting where a document starts."""
        last = len(self.ids) - length
        if last < 0:
            raise ValueError(f"the text has {len(self.ids)} tokens, fewer than one window of {length}: give more text")
        rows = []
        for row in range(max(1, num_tokens // length)):
            if row % 2:
                start = int(torch.randint(last + 1, (1,), generator=self._generator))
            else:
                pick = int(torch.randint(len(self.starts), (1,), generator=self._generator))
                start = min(int(self.starts[pick]), last)
            rows.append(self.ids[start : start + length])
        return torch.stack(rows)


def learning_rate(progress: float) -> float:
    """Linear warm-up, then a cosine down to a twentieth of the peak; `progress` runs from 0 to 1."""
    if progress < WARMUP:
        return PEAK_LR * (progress + 1e-3) / WARMUP
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - WARMUP) / (1 - WARMUP))))
    return PEAK_LR * (0.05 + 0.95 * cosine)


def train(model: LlamaForCausalLM, stream: Stream, seconds: float, max_steps: int | None, save, bf16: bool) -> float:
    """Train for `seconds` of wall time (or `max_steps`, whichever comes first).

    Args:
        save: called without arguments every few minutes.
        bf16: run matrix products in bfloat16 (autocast); the weights stay float32.

    Returns:
        The loss, averaged over the last steps (nats per token).
    """
    decay = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.95), fused=True)
    began = saved = time.monotonic()
    loss_average, step, progress = 0.0, 0, 0.0
    model.train()
    with tqdm(total=100, unit="%", bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}") as bar:
        while progress < 1.0:
            length = CONTEXT if step % 4 == 3 else CONTEXT // 4
            batch = stream.batch(BATCH_TOKENS, length)  # [num_rows, length]
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(progress)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
                loss = model(input_ids=batch, labels=batch, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            keep = min(0.98, 1 - 1 / step)
            loss_average = keep * loss_average + (1 - keep) * loss.item()
            now = time.monotonic()
            progress = max((now - began) / seconds, step / max_steps if max_steps else 0.0)
            bar.update(min(100.0, 100 * progress) - bar.n)
            bar.set_postfix_str(
                f"step {step}, loss {loss_average:.3f}, {step * BATCH_TOKENS / (now - began):.0f} tokens/s"
            )
            if now - saved > CHECKPOINT_SECONDS:
                save()
                saved = now
    return loss_average


def save_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write bf16 weights, config and tokenizer into `folder`; a reader never sees half a file of weights."""
    folder.mkdir(parents=True, exist_ok=True)
    copy = LlamaForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    scratch = folder / ".partial"
    copy.to(torch.bfloat16).save_pretrained(scratch)
    tokenizer.save_pretrained(scratch)
    for path in scratch.iterdir():
        os.replace(path, folder / path.name)
    scratch.rmdir()


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line of the training script."""
    parser = argparse.ArgumentParser(prog="python -m hf_accel.demo.train", description="Train the demo model.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--minutes", type=float, default=20.0, help="wall time to train for (default 20)")
    parser.add_argument("--steps", type=int, help="stop after so many steps, if that comes first")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's own choice)")
    parser.add_argument("--float32", action="store_true", help="no bfloat16 matrix products (for CPUs without them)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Train and save; returns the exit code."""
    args = parse_args(argv)
    if args.minutes <= 0:
        raise SystemExit("--minutes must be more than 0")
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    texts = documents(args.seed)
    tokenizer = train_tokenizer(texts)
    stream = Stream(texts, tokenizer, args.seed)
    model = make_model(tokenizer)
    num_parameters = sum(p.numel() for p in model.parameters())
    print(f"{len(texts)} documents, {len(stream.ids)} tokens, {num_parameters / 1e6:.2f}M parameters", flush=True)
    loss = train(
        model, stream, 60 * args.minutes, args.steps, lambda: save_model(model, tokenizer, args.out), not args.float32
    )
    save_model(model, tokenizer, args.out)
    print(f"loss {loss:.3f}; saved in {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
