"""What the tests of sweeps share: their settings, and a watch that only counts."""

import csv
import hashlib

import workbench

from dpsb.curves.settings import curve_settings

STEPS = 3


class Silent:
    """A watch that only counts."""

    def __init__(self):
        self.total = self.kept = 0
        self.ended = []

    def begin(self, total, kept):
        self.total, self.kept = total, kept

    def step(self, job, step, steps):
        pass

    def end(self, row):
        self.ended.append(row)


def shared(**changes):
    """Settings of every cell."""
    settings = workbench.run_settings("nowhere", steps=STEPS, eval_data=str(workbench.data_file(seed=5)))
    return {name: value for name, value in {**settings, **changes}.items() if value is not None}


def settings_of(given=None, **changes):
    usual = {
        "methods": "sb,lora",
        "epsilons": "8,inf",
        "repeats": 1,
        "learning_rates": None,
        "tuning_repeats": 1,
        "validation_data": None,
        "test_share": 0.2,
        "validation_share": 0.1,
        "split_seed": 0,
    }
    return curve_settings(shared() if given is None else given, **{**usual, **changes})


def hashes(folder):
    """Content and time of every file below a folder."""
    return {
        str(path.relative_to(folder)): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def read_csv(path):
    return list(csv.DictReader(path.read_text().splitlines()))
