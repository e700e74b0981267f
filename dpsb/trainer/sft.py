"""``DPSFTTrainer``: TRL's ``SFTTrainer``, private."""

from __future__ import annotations

try:
    from trl import SFTTrainer
except ImportError:
    raise ImportError("DPSFTTrainer needs TRL: pip install '.[trl]' in a checkout.") from None

from dpsb.trainer.mixin import DPTrainerMixin


class DPSFTTrainer(DPTrainerMixin, SFTTrainer):
    """TRL's ``SFTTrainer`` with ``privacy=PrivacyArguments(...)``; see :class:`DPTrainerMixin`."""
