"""The page of an audit: what it says of honest, refuted and partly refuted claims, with no part of the trainer."""

import re

import numpy as np
import pytest

from dpsb_accounting.auditing import CanaryScores, LowerBound, roc
from dpsb_accounting.auditing.page import Attack, to_html, to_json


def bound(epsilon, method="clopper-pearson", mu=None):
    facts = {"delta": 1e-5, "confidence": 0.95, "assumptions": ("coins are fair",)}
    return LowerBound(epsilon=epsilon, method=method, mu=mu, **facts)


def attack(*epsilons, name="gradient canaries", mu=None, **changes):
    curve = roc(CanaryScores(np.arange(40.0), np.arange(40) % 3 == 0))
    method = "gdp" if mu else "clopper-pearson"
    bounds = [bound(epsilon, method, mu) for epsilon in epsilons]
    return Attack(name=name, threat_model="sees <everything>", bounds=bounds, roc=curve, **changes)


def page(*attacks, claimed=4.0):
    facts = {"title": "Audit of <run>", "delta": 1e-5, "confidence": 0.95, "notes": ["A note & more."]}
    text = to_html(claimed_epsilon=claimed, attacks=attacks, **facts)
    assert not re.search(r"<script|<link|https?://(?!www\.w3\.org)", text)
    assert "Audit of &lt;run&gt;" in text
    assert "A note &amp; more." in text
    return text, to_json(claimed, 1e-5, 0.95, attacks)


def test_an_honest_run():
    text, content = page(attack(1.0, 2.0, expected={"clopper-pearson": 1.9}), attack(name="real examples"))
    assert "No attack contradicts the claim" in text
    assert "That is 50% of the claim" in text
    assert "sees &lt;everything&gt;" in text
    assert "1.9" in text
    assert content["epsilon_lower"] == 2.0
    assert content["ratio"] == 0.5
    assert content["refuted"] is False
    assert [one["name"] for one in content["attacks"]] == ["gradient canaries", "real examples"]
    assert "claimed_epsilon" not in content["attacks"][0]


def test_attacks_that_prove_nothing():
    text, content = page(attack(0.0))
    assert "The attacks prove nothing against it" in text
    assert content["ratio"] == 0
    text, content = page(attack(name="real examples"))
    assert "The attacks prove nothing against it" in text
    assert content["epsilon_lower"] == 0


def test_a_refuted_claim():
    text, content = page(attack(4.5))
    assert "The claim is refuted" in text
    assert "Only bounds that assume" not in text
    assert content["refuted"] is True


def test_a_claim_refuted_under_the_gaussian_assumption_alone():
    text, _ = page(attack(4.5, mu=1.5), attack(3.0, name="input canaries"))
    assert "Only bounds that assume a Gaussian trade-off" in text


@pytest.mark.parametrize(("proved", "refuted"), [(0.9, False), (1.1, True)])
def test_a_part_of_a_run_is_held_against_its_own_claim(proved, refuted):
    """1.1 is far below the run's 4, and above the 1.0 that its basis was paid for."""
    part = attack(proved, name="basis canaries", claimed_epsilon=1.0)
    text, content = page(attack(2.0), part)
    assert part.held_against(4.0) == 1.0
    assert part.refutes(4.0) is content["refuted"] is refuted
    assert ("The claim is refuted" in text) is refuted
    assert ("basis canaries attack a part whose own claim is 1, and prove" in text) is refuted
    assert f"{proved / 1.0:.0%}" in text
    assert content["attacks"][1]["claimed_epsilon"] == 1.0


def test_no_attack_at_all():
    text, content = page()
    assert "prove nothing" in text
    assert content["attacks"] == []
