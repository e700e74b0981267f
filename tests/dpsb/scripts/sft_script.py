"""An ordinary SFTTrainer script: prompts and completions. Arguments: model folder, data file, output folder."""

import json
import sys
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer


def main(model_path, data_path, out):
    rows = [json.loads(line) for line in Path(data_path).read_text().splitlines()]
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(model_path),
        args=SFTConfig(
            output_dir=out,
            max_steps=3,
            learning_rate=0.05,
            max_length=16,
            logging_steps=1,
            save_steps=2,
            report_to="none",
            use_cpu=True,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model_path),
        peft_config=LoraConfig(r=4, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:4])
