"""A Llama-3- or Qwen-class chat model on one GPU: bf16 weights, activation checkpointing, plain LoRA files at the end.

    python examples/one_gpu.py --model Qwen/Qwen3-1.7B --data support.jsonl --num-examples 20000 --out run
    python examples/one_gpu.py --out run

The first line wants a GPU, the model and rows of {"prompt": ..., "completion": ...}. The second runs anywhere in half a
minute: a tiny random model of the same class (--family llama or qwen) on made-up rows. What a step takes in memory:
dpsb plan --epsilon 8 --num-examples 20000 --model Qwen/Qwen3-1.7B --dtype bfloat16 --checkpointing.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast, Qwen3Config
from trl import SFTConfig

from dpsb import DPSFTTrainer, PrivacyArguments

TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
TINY |= {"intermediate_size": 128, "head_dim": 16, "max_position_embeddings": 256, "eos_token_id": 1, "pad_token_id": 0}
FAMILIES = {"llama": LlamaConfig, "qwen": Qwen3Config}
WORDS = [f"{thing}{number}" for thing in ("order", "parcel", "refund", "answer") for number in range(20)]


def made_up_rows() -> list[dict[str, str]]:
    """Support requests in which each order has its answer, so that there is something to learn."""
    return [{"prompt": f"order{i % 20} parcel{i % 7}", "completion": f" answer{i % 20}"} for i in range(200)]


def tiny_model(family: str) -> tuple[Any, Any]:
    """A model of the family with random weights, and a tokenizer that knows a word a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<pad>", "<end>", "<unk>", *WORDS])}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<end>", unk_token="<unk>", model_max_length=256
    )
    config = FAMILIES[family](vocab_size=len(tokenizer), **TINY)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16), tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Folder or Hub id; without it a tiny random model")
    parser.add_argument("--family", choices=FAMILIES, default="qwen", help="of the tiny model")
    parser.add_argument("--data", type=Path, help="JSON lines with prompt and completion; without it made-up rows")
    parser.add_argument("--num-examples", type=int, default=200, help="N, declared as a public number")
    parser.add_argument("--epsilon", type=float, default=8.0)
    parser.add_argument("--max-length", type=int, default=None, help="tokens; 16 for the tiny model, else 512")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    on_gpu = torch.cuda.is_available()
    if options.model:
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16)
    else:
        model, tokenizer = tiny_model(options.family)
        model.save_pretrained(options.out / "base")
        model = AutoModelForCausalLM.from_pretrained(options.out / "base", dtype=torch.bfloat16)
    rows = [json.loads(line) for line in options.data.read_text().splitlines()] if options.data else made_up_rows()

    trainer = DPSFTTrainer(
        privacy=PrivacyArguments(
            epsilon=options.epsilon,
            delta=0.1 / options.num_examples,
            num_examples=options.num_examples,
            expected_batch_size=max(1, options.num_examples // 10),
            token_budget=16384 if on_gpu else 2048,
        ),
        model=model,
        args=SFTConfig(
            output_dir=str(options.out / "run"),
            max_steps=options.steps,
            max_length=options.max_length or (512 if options.model else 16),
            learning_rate=0.02,
            lr_scheduler_type="constant",
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            bf16=False,  # mixed precision is not for private steps: the model's own weights are bf16
            report_to="none",
            use_cpu=not on_gpu,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    trainer.save_model()

    base = AutoModelForCausalLM.from_pretrained(options.model or options.out / "base", dtype=torch.bfloat16)
    served = PeftModel.from_pretrained(base, str(options.out / "run")).eval()  # plain PEFT: nothing of dpsb is needed
    asked = tokenizer(made_up_rows()[0]["prompt"], return_tensors="pt", return_token_type_ids=False)
    said = served.generate(**asked, max_new_tokens=8, do_sample=False)
    print("answer:", tokenizer.decode(said[0, asked["input_ids"].shape[1] :], skip_special_tokens=True))
    print(json.loads((options.out / "run" / "report.json").read_text())["statement"])


if __name__ == "__main__":
    main()
