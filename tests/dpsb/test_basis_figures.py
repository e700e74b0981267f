"""What a diagnosis recommends, by its figures alone, and what it advises on the head."""

from dataclasses import replace

import pytest

from dpsb.basis.figures import BasisFigures, SetFigures, advice_on_head, recommend


def bases(**energies):
    """One number of each basis, or one for each set that judges."""
    made = []
    for name, energy in {"weight": 0.04, **energies}.items():
        each = energy if isinstance(energy, tuple) else () if energy is None else (energy,)
        basis = {"public": "public:near", "far": "public:far"}.get(name, name)
        mean = sum(each) / len(each) if each else None
        paid = name in ("private", "hybrid")
        made.append(BasisFigures(basis=basis, paid=paid, energy=mean, energies=each, visible_layers=0.1))
    return made


def public_sets(count=1, coherence=0.8, **changes):
    return [
        SetFigures(name=name, labels="", examples=64, coherence=coherence, own_half=1.0, **changes)
        for name in ("near", "far")[:count]
    ]


@pytest.mark.parametrize(
    ("energies", "expected", "said"),
    [
        (
            {"public": 0.2},
            "public:near",
            "it holds 20 % of the gradient's energy, the best data-free basis (weight) 4 %",
        ),
        ({"public": 0.041}, "weight", "the nearest public file holds no more than 4.1 %"),
        ({"public": 0.2, "hybrid": 0.3}, "hybrid", "forecast for the budget: it holds 30 %"),
        (
            {"public": 0.2, "private": 0.22},
            "public:near",
            "worth its price (private: 22 %, 10 % of its layers above noise)",
        ),
        (
            {"public": 0.2, "private": None},
            "public:near",
            "judged on held-out rows of near, its own file, too kind if the private data are unlike it",
        ),
    ],
)
def test_the_recommendation_and_its_reason(energies, expected, said):
    basis, reason = recommend(bases(**energies), public_sets())
    assert basis == expected
    assert said in reason
    assert reason.endswith(".")
    assert reason.count(". ") == 0, "one sentence"


def test_the_recommendation_says_what_it_rests_on():
    assert "too kind" not in recommend(bases(public=0.041), public_sets())[1], "a data-free basis is of no file"
    assert "too kind" in recommend(bases(public=0.2, private=0.3), public_sets())[1], "a forecast is of a file"
    assert "hardly agree" in recommend(bases(public=0.2), public_sets(1, 0.01))[1]


PUB_ALONE = {"public": 0.919, "private": 0.891}


def test_an_unrelated_file_makes_no_basis_worth_paying_for():
    assert recommend(bases(**PUB_ALONE), public_sets())[0] == "public:near"
    near, far = public_sets(2)
    judged = [replace(near, run_labels=True), replace(far, judges=False)]
    assert recommend(bases(**PUB_ALONE, far=0.0111), judged)[0] == "public:near"
    energies = {"public": (0.919, 0.01), "far": (0.0111, 0.8), "private": (0.891, 0.78)}
    basis, reason = recommend(with_own(bases(weight=(0.04, 0.04), **energies)), [near, far])
    assert basis == "public:near", "without labels both judge, and each has a basis of its own that holds more"
    assert "its own file among them" in reason
    assert "it holds 1 % of the others" in reason


def test_a_paid_basis_has_to_be_worth_it_on_every_set():
    found = bases(weight=(0.04, 0.04), public=(0.3, 0.1), far=(0.1, 0.3), private=(0.5, 0.5))
    assert recommend(with_own(found), public_sets(2))[0] == "private"
    found = bases(weight=(0.04, 0.04), public=(0.5, 0.1), far=(0.1, 0.3), private=(0.5, 0.5))
    assert recommend(with_own(found), public_sets(2))[0] == "public:near"


def with_own(found):
    return [replace(entry, of_own=entry.energy) for entry in found]


def test_files_that_are_not_told_apart():
    energies = {"weight": (0.04, 0.04), "public": (0.3, 0.2), "far": (0.2, 0.33)}
    basis, reason = recommend(with_own(bases(**energies)), public_sets(2))
    assert basis == "public:near", "the first named"
    assert "does not tell them apart" in reason
    assert "it holds 25 % of what a public set's own basis holds of its gradient" in reason
    assert recommend(with_own(bases(**{**energies, "far": (0.28, 0.33)})), public_sets(2))[0] == "public:far"
    near, far = public_sets(2)
    judged = [replace(near, judges=False), replace(far, run_labels=True)]
    basis, reason = recommend(bases(public=0.31, far=0.3), judged)
    assert basis == "public:far", "the one with the run's labels"
    assert "those with the run's labels before others" in reason


@pytest.mark.parametrize(
    ("share", "numbers", "said"),
    [
        (0.1, 29_645, "the head, 29,645 numbers beside 3,072 of the cores, has 10 % of a row's squared norm"),
        (0.1, 1_155, ""),  # SNLI
        (0.86, 29_645, ""),
        (None, 0, ""),
    ],
)
def test_a_large_head_with_a_small_share_gets_advice(share, numbers, said):
    basis = BasisFigures(basis="public:near", paid=False, energy=0.6, head_share=share)
    silent = SetFigures(name="far", labels="", examples=64, coherence=0.8, judges=False)
    advice = advice_on_head(basis, [replace(public_sets()[0], head_numbers=numbers), silent], 3_072)
    assert said in advice
    assert ("try --head-share 0.5" in advice) == bool(said) == bool(advice)
