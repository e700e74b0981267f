"""The Trainer script made private: a classifier on texts. Arguments: model folder, data file, output folder."""

import json
import sys
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainingArguments

from dpsb import DPTrainer, PrivacyArguments


def main(model_path, data_path, out):
    rows = [json.loads(line) for line in Path(data_path).read_text().splitlines()]
    names = ["ham", "spam"]
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForSequenceClassification.from_pretrained(model_path, num_labels=2)
    config = LoraConfig(r=4, lora_alpha=4, task_type="SEQ_CLS", target_modules=["query", "value"])
    model = get_peft_model(model, config)

    def encode(row):
        label = names.index(row["label"]) if row["label"] in names else -100
        return {**tokenizer(row["text"], truncation=True, max_length=16, padding="max_length"), "labels": label}

    data = Dataset.from_list(rows).map(encode)
    arguments = TrainingArguments(
        output_dir=out,
        max_steps=3,
        learning_rate=0.05,
        per_device_train_batch_size=4,
        logging_steps=1,
        save_steps=2,
        report_to="none",
        use_cpu=True,
    )
    privacy = PrivacyArguments(epsilon=8, delta=1e-3, num_examples=60, expected_batch_size=12)
    trainer = DPTrainer(
        privacy=privacy,
        model=model,
        args=arguments,
        train_dataset=data,
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:4])
