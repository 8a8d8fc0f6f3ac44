"""Trains a tiny Phi-2 on short stories: a PhiForCausalLM that is not random, in about four CPU minutes.

    python tests/phi/train_tiny_phi.py TEXT OUT

TEXT is a file of stories (docs/families.md uses `tiny.utf8` of the package exllamav2), OUT the folder to write: a
Hugging Face checkpoint with its tokenizer, and the two parts of TEXT, `train.txt` and `held_out.txt` (the last tenth).
Needs torch; training runs on the CPU.
"""

import math
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PhiConfig, PhiForCausalLM, PreTrainedTokenizerFast

VOCABULARY, LENGTH, BATCH, STEPS = 512, 128, 16, 500
RATE, WARMUP = 2e-3, 30


def main(text_file: Path, folder: Path) -> None:
    """Writes the folder."""
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    text = text_file.read_text("utf-8")
    cut = text.rindex("\n", 0, len(text) * 9 // 10) + 1
    train, held_out = text[:cut], text[cut:]
    (folder / "train.txt").write_text(train, "utf-8")
    (folder / "held_out.txt").write_text(held_out, "utf-8")
    tokenizer = make_tokenizer(train)
    tokenizer.save_pretrained(folder)
    model = train_model(torch.tensor(tokenizer(train, verbose=False).input_ids))
    model.save_pretrained(folder)
    print(f"held-out loss {loss(model, torch.tensor(tokenizer(held_out, verbose=False).input_ids)):.3f}")


def make_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end)


def train_model(tokens: torch.Tensor) -> PhiForCausalLM:
    """Phi-2 in small: parallel blocks, LayerNorm, biases, half of each head rotated."""
    config = PhiConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
    )
    model = PhiForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate_at)
    for step in range(STEPS):
        starts = torch.randint(len(tokens) - LENGTH, (BATCH,)).tolist()
        batch = torch.stack([tokens[start : start + LENGTH] for start in starts])
        current = model(batch, labels=batch).loss
        current.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0:
            print(f"step {step}  loss {current.item():.3f}", flush=True)
    return model.eval()


def rate_at(step: int) -> float:
    """Share of the learning rate: linear warm-up, then half a cosine."""
    return min((step + 1) / WARMUP, 0.5 + 0.5 * math.cos(math.pi * step / STEPS))


@torch.no_grad()
def loss(model: PhiForCausalLM, tokens: torch.Tensor) -> float:
    """Mean loss over consecutive windows."""
    windows = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)
    return model(windows, labels=windows).loss.item()


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
