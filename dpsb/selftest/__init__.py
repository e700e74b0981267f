"""The self-test: what ``dpsb``, or anybody's private training step, does with synthetic examples.

``run_selftest(step, examples)`` tests a step that its owner takes apart with :class:`Step`; ``selftest_model`` tests
``fit`` with a user's own model, collator and loss.
"""

from __future__ import annotations

from dpsb.selftest.model import selftest_model
from dpsb.selftest.ours import own_step
from dpsb.selftest.result import ERROR_RATE, Check, SelfTest
from dpsb.selftest.run import run_selftest
from dpsb.selftest.step import Step

__all__ = ["ERROR_RATE", "Check", "SelfTest", "Step", "own_step", "run_selftest", "selftest_model"]
