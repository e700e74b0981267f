"""``DPTrainer``: transformers' ``Trainer``, private."""

from __future__ import annotations

from transformers import Trainer

from dpsb.trainer.mixin import DPTrainerMixin


class DPTrainer(DPTrainerMixin, Trainer):
    """transformers' ``Trainer`` with ``privacy=PrivacyArguments(...)``; see :class:`DPTrainerMixin`."""
