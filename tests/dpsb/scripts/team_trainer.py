"""Run by ``test_trainer_launch``, by one process and by two: argument: output folder."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import trainers

from dpsb.randomness import SeededRandomness

torch.set_num_threads(1)


def main(out):
    trainer = trainers.build(
        Path(out),
        randomness=SeededRandomness(5),
        args={"eval_strategy": "steps", "eval_steps": 2, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
        | {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"},
        eval_dataset=trainers.labelled(seed=9, count=20),
    )
    result = trainer.train()
    trainer.save_model()
    trainer.save_state()
    facts = {
        "rank": trainer.args.process_index,
        "steps": result.global_step,
        "theta": trainers.theta(trainer.adapter).tolist(),
        "eval_loss": trainer.evaluate()["eval_loss"],
    }
    Path(out, f"facts-{trainer.args.process_index}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(*sys.argv[1:2])
