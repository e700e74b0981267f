"""``class T(DPTrainerMixin, Trainer)``: the Trainer's surroundings, with the private loop of ``fit`` inside.

The Trainer keeps what lies around a step: arguments, callbacks, logging, evaluation, schedules, folders, the Hub. The
step itself (charge, Poisson draw, per-example gradients, clipping, one noise draw, optimizer) is
:func:`dpsb.train.private_steps`, whatever batch size and accumulation say.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from dpsb.adapter import Adapter, Basis, attach
from dpsb.checkpoint import read_state
from dpsb.data import Collator
from dpsb.display import SpentCurve
from dpsb.distributed.lead import Leader
from dpsb.distributed.team import Team, running_team
from dpsb.distributed.work import Work
from dpsb.fingerprint import fingerprint
from dpsb.losses import causal_lm_loss, classification_loss
from dpsb.models import HEAD_NAMES
from dpsb.modes import training_mode
from dpsb.probe import Batch, Example, without_dropout
from dpsb.randomness import Randomness, SystemRandomness
from dpsb.sampling import bucket_of, length_buckets
from dpsb.selftest.start import check_before_run
from dpsb.start import attach_again, digest, read_start, start_of
from dpsb.train import private_steps
from dpsb.trainer import files, refusals, together
from dpsb.trainer.arguments import PrivacyArguments
from dpsb.trainer.building import basis_of, by_name, check_evaluation, give_adapter, is_trained, with_own_arithmetic
from dpsb.trainer.examples import Form, TokenExamples, form_of
from dpsb.trainer.guard import check_no_listeners, check_reload, check_unchanged
from dpsb.trainer.planning import plan_of
from dpsb.trainer.refusals import TrainerArgumentError
from dpsb.trainer.surroundings import Surroundings
from dpsb_accounting import Ledger, make_report


class DPTrainerMixin(Surroundings):
    """Makes a ``Trainer`` or TRL's ``SFTTrainer`` private; put it *before* the Trainer among the base classes.

    Guarantees:
      * What training leaves (weights, checkpoints, logs, report) is a function of at most T releases of the plan's
        mechanism, of public facts, and of what evaluation on ``eval_dataset`` decides; T, q, C and the noise are those
        of the ledger's first line.
      * A step is on disk in ``output_dir/ledger.jsonl`` before its examples are drawn, in this run and in any
        resumed one.
      * No training loss, gradient norm or drawn size is logged or written.

    What lies outside: people in ``eval_dataset`` (their metrics choose a best checkpoint and stop early); whatever a
    callback of the user does with the model, which it sees as it is between two steps, and with data it holds itself.

    Args:
      args, kwargs: As for the Trainer beside it. ``args`` (TrainingArguments or SFTConfig) must be given.
      privacy: :class:`dpsb.PrivacyArguments`.
      basis: A basis from public data for the very layers of the model, in the place of ``privacy.basis``.

    Raises:
      TrainerArgumentError: If an argument does not go with private training (``dpsb.trainer.refusals``); no row of
        the data has been read then.
      ValueError: If the model's adapter cannot be turned into one whose only trained tensors are the cores.
    """

    privacy: PrivacyArguments
    form: Form
    randomness: Randomness
    _resuming = False
    _leader: Leader | None = None
    _evaluated: dict[str, Any]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in ("_inner_training_loop", "_save_checkpoint"):
            definer = next(kind for kind in cls.__mro__ if name in vars(kind))
            if definer not in (DPTrainerMixin, Surroundings):
                raise TypeError(
                    f"{cls.__name__} would train without privacy: {definer.__name__}.{name} comes before "
                    "DPTrainerMixin's. Put DPTrainerMixin first among the base classes, and do not override it."
                )

    def __init__(self, *args: Any, privacy: PrivacyArguments, basis: Basis | None = None, **kwargs: Any) -> None:
        if not isinstance(privacy, PrivacyArguments):
            raise TrainerArgumentError(f"Expected privacy to be PrivacyArguments, got {type(privacy).__name__}.")
        given = by_name(super().__init__, args, kwargs)
        if given.get("args") is None:
            raise TrainerArgumentError("Expected args to be given: its output_dir is where the ledger goes.")
        refusals.check(type(self), given)
        self._never_evaluated = (given.get("train_dataset"),)
        check_evaluation(self._never_evaluated, given.get("eval_dataset"))
        given["args"] = with_own_arithmetic(given["args"])
        self.privacy = privacy
        self.randomness = SystemRandomness()
        give_adapter(given, privacy, "peft_config" in inspect.signature(super().__init__).parameters)
        super().__init__(**given)
        self._as_prepared = (given.get("train_dataset"), self.train_dataset)
        self.accelerator.native_amp = False  # evaluation would wrap the model's forward pass in autocast for good
        if not isinstance(self.model, PeftModel):
            raise TrainerArgumentError(
                "Expected a model with a LoRA adapter: give PrivacyArguments.rank, peft_config, or a model from "
                "peft.get_peft_model."
            )
        self._trained_before = is_trained(self.model)
        longest = privacy.max_length or getattr(self.args, "max_length", None)
        self.form = form_of(self.model, self.processing_class, self.train_dataset, longest)
        self.adapter = attach(self.model, basis_of(self.model, privacy, basis), allow=HEAD_NAMES)
        self.adapter.check_nothing_else_is_trained()

    # --- what a subclass may override

    def per_example_loss(self, model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """One loss per example, shape ``(n,)``, each of that example alone; the probe checks an override.

        By default cross-entropy of the label, or the mean over the example's *own* labelled tokens.
        """
        return (classification_loss if self.form.task == "classification" else causal_lm_loss)(model, batch)

    def per_example_batch(self, examples: Sequence[Example], padded_length: int) -> Batch:
        """Examples to model inputs, padded to exactly ``padded_length`` tokens; the probe checks an override."""
        return self._collator()(examples, padded_length)

    # --- training

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Trains, or goes on training: T minus the charged steps are left, whatever checkpoint is loaded.

        Args:
          resume_from_checkpoint: True for the newest checkpoint of ``output_dir`` (or its start, if there is none), or
            the folder of one.
          args, kwargs: As for the Trainer.

        Returns:
          ``TrainOutput`` whose ``training_loss`` is NaN: it is not released.
        """
        if self.train_dataset is None:
            raise TrainerArgumentError("Expected train_dataset to be given.")
        out = Path(self.args.output_dir)
        folder: Any = resume_from_checkpoint or None
        self._team = running_team()
        if self._team is None and self.args.world_size > 1:
            raise TrainerArgumentError(
                f"world_size={self.args.world_size} is refused without a torch.distributed process group; start the "
                "script with `accelerate launch` or torchrun."
            )
        if self._follows:
            return super().train(None, *args, **kwargs)  # type: ignore[misc]
        files.check_folder(out, resume=folder is not None)
        charged = self._ledger is not None and self._ledger.charged("train")
        if folder is None and (charged or self._trained_before):
            raise files.TrainerRunError(
                "The model has been trained privately already, and a new ledger would not count the steps that its "
                "weights come from. Continue that run with resume_from_checkpoint, or load the base model anew."
            )
        self._resuming = folder is not None
        if folder is True:
            folder = str(files.checkpoints(out)[-1]) if files.checkpoints(out) else None
        parent: Any = super()
        try:
            return parent.train(folder, *args, **kwargs)
        finally:
            self.is_in_train = False

    def _inner_training_loop(
        self,
        batch_size: Any = None,  # noqa: ARG002 - the Trainer's own signature
        args: Any = None,  # noqa: ARG002
        resume_from_checkpoint: str | None = None,
        trial: Any = None,
        ignore_keys_for_eval: Any = None,
    ) -> Any:
        """Takes the place of the Trainer's own loop."""
        if trial is not None:
            self.hyperparameter_search()
        if self._team is not None and self._follows:
            return self._assisted(self._team, ignore_keys_for_eval)
        out = Path(self.args.output_dir)
        ledger = self._opened(out)
        self._ledger, self._spent, self._evaluated = ledger, SpentCurve(ledger.plan), {}
        with ledger:
            try:
                with training_mode(self.model):
                    self._prepare(ledger, resume_from_checkpoint)
                    self._moved = None
                    if resume_from_checkpoint is not None:
                        self._moved = read_state(Path(resume_from_checkpoint), self.adapter, self.optimizer, ledger)
                    self._check_on_synthetic(ledger)
                    self._frozen = fingerprint(self.adapter)
                    self._loop(ledger, ignore_keys_for_eval)
                    check_unchanged(self.adapter, self._frozen)
            except BaseException:
                if not self._resuming and not ledger.charged("train"):
                    files.forget(out)  # nothing was drawn, nothing is spent; under the lock, so by nobody else either
                    self._ledger = None
                raise
        return self._finished(ledger)

    def _opened(self, out: Path) -> Ledger:
        """The run's ledger: a new one with its plan, or the one that goes on."""
        self.optimizer = self.lr_scheduler = None  # made for tensors that may be gone
        asked = partial(plan_of, self.privacy, self.args, self.adapter, self.form, self._counted())
        if not self._resuming:
            return files.new_ledger(out, asked(digest(start_of(self.adapter))), self.adapter)
        record = Ledger.read(out / files.LEDGER_NAME)
        existing = record.plan
        start = read_start(out, existing)
        asked(digest(start), existing)
        files.check_not_behind(out, record)
        self.adapter = attach_again(self.model, start, existing)
        (out / files.REPORT_NAME).unlink(missing_ok=True)  # of an earlier stop; this run writes its own or none
        return Ledger.open(out / files.LEDGER_NAME)

    def _counted(self) -> Any:
        """The data set whose length is N where none is declared: as given, since TRL drops rows by what they hold."""
        given, prepared = self._as_prepared
        return given if self.train_dataset is prepared else self.train_dataset

    def _prepare(self, ledger: Ledger, folder: str | None) -> None:
        """Optimizer, schedule and the Trainer's state, as far along as the ledger says."""
        from torch.optim.lr_scheduler import LambdaLR

        trainer: Any = self
        plan, done = ledger.plan, ledger.charged("train")
        trainer.create_optimizer()
        trainer.create_scheduler(num_training_steps=plan.steps, optimizer=self.optimizer)
        if type(self.lr_scheduler) is not LambdaLR or len({id(rule) for rule in self.lr_scheduler.lr_lambdas}) > 1:
            raise TrainerArgumentError(
                f"lr_scheduler={type(self.lr_scheduler).__name__} is refused in private training: learning rates must "
                "be one public function of the step for all groups, as a LambdaLR of one function is."
            )
        self.state = files.restored_state(self, folder, plan, done)
        self.lr_scheduler.last_epoch = done
        for name in ("model", "optimizer", "lr_scheduler"):
            setattr(self.callback_handler, name, getattr(self, name))
        self.callback_handler.train_dataloader = None

    def _check_on_synthetic(self, ledger: Ledger) -> None:
        """The tests that need no charge and no data, if there is a step left to test for."""
        plan, synthetic = ledger.plan, self.form.synthetic()
        shortest = bucket_of(len(synthetic[0]["input_ids"]), length_buckets(self.form.max_length))
        if not ledger.remaining("train"):
            return
        with without_dropout(self.model):
            batch = self.per_example_batch(synthetic[:3], shortest)
            check_reload(self.adapter, self._save_plainly, self.per_example_loss, batch)
            if self.privacy.self_test and plan.is_private:
                check_before_run(
                    self.adapter,
                    self.per_example_loss,
                    self.per_example_batch,
                    synthetic,
                    self.form.max_length,
                    self.privacy.token_budget,
                )

    def _loop(self, ledger: Ledger, ignore_keys: Any) -> None:
        """The steps that are left, and what the Trainer does between them."""
        plan, handler = ledger.plan, self.callback_handler
        factor = self.lr_scheduler.lr_lambdas[0]
        self._logged = self.state.global_step
        work, synthetic = self._work(self.adapter), self.form.synthetic()
        self._leader = None if self._team is None else together.lead(self._team, plan, work, synthetic)
        steps = private_steps(
            self.adapter,
            work.dataset,
            ledger=ledger,
            optimizer=self.optimizer,
            loss_fn=self.per_example_loss,
            collate=self.per_example_batch,
            synthetic=synthetic,
            max_length=self.form.max_length,
            schedule=lambda done: factor(round(done * plan.steps)),
            token_budget=self.privacy.token_budget,
            randomness=self.randomness,
            team=self._leader,
            base_rates=[float(group["initial_lr"]) for group in self.optimizer.param_groups],
            moved_clip_norm=self._moved,
        )
        per_epoch = max(1, math.ceil(1 / plan.sampling_prob))
        self.control = handler.on_train_begin(self.args, self.state, self.control)
        if self.args.eval_on_start:
            self._evaluate_together(ignore_keys)
        with closing(steps):
            while ledger.remaining("train") and not self.control.should_training_stop:
                if self.state.global_step % per_epoch == 0:
                    self.control = handler.on_epoch_begin(self.args, self.state, self.control)
                self.control = handler.on_step_begin(self.args, self.state, self.control)
                check_no_listeners(self.adapter)
                progress, self._moved = next(steps)
                self.lr_scheduler.step()
                self.state.global_step = progress.step
                self.state.epoch = progress.step * plan.sampling_prob
                self.control = handler.on_step_end(self.args, self.state, self.control)
                self._between(ignore_keys)
                if progress.step % per_epoch == 0 or progress.step == plan.steps:
                    self.control = handler.on_epoch_end(self.args, self.state, self.control)
                    self._between(ignore_keys)

    def _between(self, ignore_keys: Any) -> None:
        """Logs, evaluates and saves where the callbacks ask for it."""
        trainer: Any = self
        if self.control.should_log and self.state.global_step > self._logged:
            self._logged = self.state.global_step
            self.log({**self.epsilon_spent(), "learning_rate": float(self.lr_scheduler.get_last_lr()[0])})
        self._show_spent()
        if self.control.should_evaluate:
            self._evaluated = self._evaluate_together(ignore_keys)
            better = trainer._determine_best_metric(metrics=self._evaluated, trial=None)
            if getattr(self.args.save_strategy, "value", self.args.save_strategy) == "best":
                self.control.should_save = better
        if self.control.should_save:
            self._save_checkpoint(self.model, None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def _finished(self, ledger: Ledger) -> Any:
        """Report, best checkpoint, last callbacks."""
        from transformers.trainer_utils import TrainOutput

        report = make_report(ledger, held_out=files.held_out_of(self._evaluated))
        report.write(Path(self.args.output_dir) / files.REPORT_NAME)
        metrics = {"train_steps": float(self.state.global_step), **self.epsilon_spent()}
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            self._load_best_model()
        if self._leader is not None:
            self._leader.stop()
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        return TrainOutput(self.state.global_step, math.nan, metrics)

    def _evaluate_together(self, ignore_keys: Any) -> dict[str, Any]:
        trainer: Any = self
        if self._leader is not None:
            self._leader.evaluate()
        found: dict[str, Any] = trainer._evaluate(None, ignore_keys)
        return found

    def _assisted(self, team: Team, ignore_keys: Any) -> Any:
        """The loop of a process that another leads: no ledger, no callbacks, no files."""
        from transformers.trainer_utils import TrainOutput

        trainer: Any = self
        plan = together.assist(
            team, self.model, self._work, self.form.synthetic(), lambda: trainer._evaluate(None, ignore_keys)
        )
        self.state.global_step = plan.steps
        return TrainOutput(plan.steps, math.nan, {})

    def _work(self, adapter: Adapter) -> Work:
        self.adapter = adapter  # its device is where batches go
        return Work(
            adapter=adapter,
            dataset=TokenExamples(self.train_dataset, self.form),
            loss_fn=self.per_example_loss,
            collate=self.per_example_batch,
            buckets=length_buckets(self.form.max_length),
            token_budget=self.privacy.token_budget,
            sharded=False,
        )

    def _collator(self) -> Collator:
        return self.form.collator(self.adapter.parameters()[0].device)
