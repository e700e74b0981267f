"""What lies around a private Trainer's steps: evaluating, logging, saving, loading. Nothing here reads private data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from dpsb.adapter import Adapter
from dpsb.checkpoint import THETA_NAME
from dpsb.display import SpentCurve
from dpsb.distributed.team import Team
from dpsb.trainer import files
from dpsb.trainer.building import check_evaluation
from dpsb.trainer.guard import check_unchanged
from dpsb.trainer.preparing import data_withheld, warnings_without_text
from dpsb.trainer.refusals import TrainerArgumentError
from dpsb_accounting import Ledger

_NEVER_LOGGED = (
    *("loss", "train_loss", "grad_norm", "total_flos", "entropy", "mean_token_accuracy", "num_tokens", "aux_loss"),
    *("num_input_tokens_seen", "train_runtime", "train_samples_per_second", "train_steps_per_second"),
)


class Surroundings:
    """The half of :class:`dpsb.DPTrainerMixin` that the Trainer calls between steps and afterwards."""

    adapter: Adapter
    accelerator: Any
    args: Any
    model: Any
    state: Any
    control: Any
    optimizer: Any
    lr_scheduler: Any
    callback_handler: Any
    processing_class: Any
    train_dataset: Any
    eval_dataset: Any
    _ledger: Ledger | None = None
    _team: Team | None = None
    _moved: float | None = None
    _spent: SpentCurve
    _never_evaluated: tuple[Any, ...] = ()
    _frozen: Mapping[str, int]

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As the Trainer's, on held-out data, which lies outside the guarantee; never on the training data."""
        trainer: Any = super()
        asked = self.eval_dataset if eval_dataset is None else eval_dataset
        check_evaluation((*self._never_evaluated, self.train_dataset), asked)
        metrics: dict[str, float] = trainer.evaluate(eval_dataset, *args, **kwargs)
        return metrics

    def predict(self, test_dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's; never on the training data, whose loss would be among the metrics."""
        trainer: Any = super()
        check_evaluation((*self._never_evaluated, self.train_dataset), test_dataset)
        return trainer.predict(test_dataset, *args, **kwargs)

    @property
    def _follows(self) -> bool:
        """Whether another process leads this one, which then writes nothing."""
        return self._team is not None and not self._team.leads

    def epsilon_spent(self) -> dict[str, float]:
        """Upper bound on epsilon after the steps so far, as information; the claim is the plan's, in the report.

        Empty where there is nothing to claim: before training, and for a run that is tainted.
        """
        ledger = self._ledger
        if ledger is None or ledger.taints or not ledger.plan.is_private or not ledger.charged("train"):
            return {}
        return {"epsilon": self._spent.upper(ledger.charged("train")), "delta": ledger.plan.delta}

    def _show_spent(self) -> None:
        """Epsilon beside the progress bar."""
        spent = self.epsilon_spent()
        for callback in self.callback_handler.callbacks:
            bar = getattr(callback, "training_bar", None)
            if spent and bar is not None and hasattr(bar, "set_postfix_str"):
                bar.set_postfix_str(f"epsilon <= {spent['epsilon'] * (1 + 5e-5):.5g}")

    def _save_plainly(self, folder: Path) -> None:
        self.model.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)

    def _save_checkpoint(self, model: Any, trial: Any = None) -> None:  # noqa: ARG002 - the Trainer's own signature
        """Writes ``checkpoint-N``; nothing pickled, no random state, no losses."""
        if self._ledger is None:
            raise files.TrainerRunError("There is nothing to checkpoint before train() has begun.")
        from transformers.trainer_callback import TrainerState

        check_unchanged(self.adapter, self._frozen)
        out = Path(self.args.output_dir)
        self.state.stateful_callbacks = TrainerState(stateful_callbacks=files.exported(self)).stateful_callbacks
        if self.state.best_global_step is not None:
            best = out / f"checkpoint-{self.state.best_global_step}"
            if best.exists() or self.state.best_global_step == self.state.global_step:
                self.state.best_model_checkpoint = str(best)
        files.write_checkpoint(
            out / f"checkpoint-{self.state.global_step}",
            self.adapter,
            self.optimizer,
            self._ledger,
            self._moved,
            self.processing_class,
            self.state,
        )
        files.remove_old(out, self.args.save_total_limit, self.state.best_model_checkpoint)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes a plain LoRA adapter, the cores, the tokenizer and, once trained, the model card with the claim."""
        folder = Path(output_dir or self.args.output_dir)
        if self._follows:
            return
        if self._ledger is None:
            self._save_plainly(folder)
        else:
            files.save_adapter(folder, Path(self.args.output_dir), self.adapter, self._ledger, self.processing_class)
        if self.args.push_to_hub and not _internal_call:
            hub: Any = self
            hub.push_to_hub(commit_message="Model save")

    def save_state(self) -> None:
        """Writes ``trainer_state.json`` without losses."""
        if self._follows:
            return
        Path(self.args.output_dir).mkdir(parents=True, exist_ok=True)
        files.without_losses(self.state).save_to_json(str(Path(self.args.output_dir) / files.STATE_FILE))

    def create_model_card(self, *_args: Any, **_kwargs: Any) -> None:
        """Nothing: ``save_model`` has written a card that says what is claimed, which no other may replace."""

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Nothing: the Trainer's own would pickle its arguments."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Nothing: theta and the optimizer are read once the ledger is open, which has the last word."""

    def _load_best_model(self) -> None:
        """Puts theta of the best checkpoint into the model, exactly."""
        self.adapter.load_state(load_file(Path(self.state.best_model_checkpoint) / THETA_NAME))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Logs what is public or released; a training loss or gradient norm is left out, whoever brings it."""
        trainer: Any = super()
        trainer.log({name: value for name, value in logs.items() if name not in _NEVER_LOGGED}, *args, **kwargs)

    def hyperparameter_search(self, *_args: Any, **_kwargs: Any) -> Any:
        """Refused: every trial would spend the whole epsilon on the same data."""
        raise TrainerArgumentError(
            "hyperparameter_search is refused in private training: every trial spends the whole epsilon on the same "
            "data. Choose rates on public data, or run trials with PrivacyArguments of their own and add them up."
        )

    def _prepare_dataset(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's tokenization; its errors may quote rows, so only their kind is told."""
        trainer: Any = super()
        with data_withheld(), warnings_without_text():
            return trainer._prepare_dataset(*args, **kwargs)
