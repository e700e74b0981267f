import json

import pytest
from plans import make_plan

from dpsb_accounting import ApproximateDP, Ledger, ResourceLimit, epsilon

GAUSSIAN = {"type": "GaussianDpEvent", "noise_multiplier": 4}
STEP = {
    "type": "PoissonSampledDpEvent",
    "sampling_probability": 0.01,
    "event": {"type": "GaussianDpEvent", "noise_multiplier": 1},
}
RUN = {"type": "SelfComposedDpEvent", "count": 1000, "event": STEP}


@pytest.fixture
def file(tmp_path):
    """Writes JSON, or text as it is, and returns the path."""

    def _file(content, name="event.json"):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return _file


def make_ledger(folder, name, **changes):
    path = folder / name
    with Ledger.create(path, make_plan(**changes)) as ledger:
        ledger.charge("train")
    return path


@pytest.mark.parametrize(
    ("event", "neighboring", "reference"),
    [
        (RUN, "add_or_remove_one", 1.828237),
        ({"type": "ComposedDpEvent", "events": [{**GAUSSIAN, "noise_multiplier": 5}, RUN]}, "zero_out", 1.99248),
        ({"type": "SelfComposedDpEvent", "event": GAUSSIAN, "count": 10}, "replace_one", 7.51128),
        ({"type": "ParallelComposition", "events": [RUN, GAUSSIAN]}, "add_or_remove_one", 1.828237),
        ({"type": "poisson_gaussian", "noise_multiplier": 1, "sampling_prob": 0.01}, "zero_out", 0.1994504),
    ],
)
def test_event_files(call, file, event, neighboring, reference):
    arguments = ["--delta", "1e-5", "--neighboring", neighboring, "--json"]
    code, out, _ = call("epsilon", "--event", file(event), *arguments)
    data = json.loads(out)
    assert code == 0
    assert data["epsilon"]["lower"] <= reference * (1 + 1e-5)
    assert reference * (1 - 1e-5) <= data["epsilon"]["upper"] <= reference * 1.005
    assert (data["delta"], data["neighboring"]) == (1e-5, neighboring)
    assert data["method"]


def test_a_poisson_number_of_runs_may_be_written_as_infinity(call, file):
    run = {"type": "RepeatAndSelectDpEvent", "event": RUN, "mean": 10, "shape": float("inf")}
    code, out, _ = call("epsilon", "--event", file(run), "--delta", "1e-5", "--json")
    assert code == 0
    assert json.loads(out)["epsilon"]["upper"] == pytest.approx(4.3294, rel=1e-4)


def test_delta_is_the_inverse(call, file):
    code, out, _ = call("delta", "--event", file(RUN), "--epsilon", "1.828237", "--json")
    data = json.loads(out)
    assert code == 0
    assert data["delta"]["lower"] <= 1e-5 <= data["delta"]["upper"] * (1 + 1e-6)
    assert "delta in" in call("delta", "--event", file(RUN), "--epsilon", "2")[1]


def test_a_ledger_brings_its_own_delta_and_relation(call, tmp_path):
    path = make_ledger(tmp_path, "ledger.jsonl", neighboring="replace_one", unit="user")
    code, out, _ = call("epsilon", path, "--json")
    data = json.loads(out)
    assert code == 0
    assert data["epsilon"]["upper"] == epsilon(Ledger.read(path)).upper
    assert (data["delta"], data["neighboring"], data["unit"]) == (1e-5, "replace_one", "user")


def test_runs_on_the_same_data_compose(call, tmp_path, file):
    one, two = make_ledger(tmp_path, "a.jsonl"), make_ledger(tmp_path, "b.jsonl")
    code, out, _ = call("compose", one, two, file(GAUSSIAN), "--json")
    together = json.loads(out)["epsilon"]
    assert code == 0
    assert together["lower"] > epsilon(Ledger.read(one)).upper
    code, _, err = call("compose", one, one)
    assert (code, "given twice" in err) == (1, True)
    other = make_ledger(tmp_path, "c.jsonl", neighboring="zero_out")
    code, _, err = call("compose", one, other)
    assert (code, "different relations" in err) == (1, True)
    other = make_ledger(tmp_path, "d.jsonl", unit="user")
    assert "different units" in call("compose", one, other)[2]
    fixed = make_ledger(tmp_path, "e.jsonl", neighboring="zero_out", num_examples_declared=False)
    assert "not declared" in call("compose", fixed, "--neighboring", "add_or_remove_one")[2]


def test_a_delta_at_which_a_run_promises_nothing_is_refused(call, tmp_path):
    few = make_ledger(tmp_path, "few", num_examples=400, delta=2e-3)
    many = make_ledger(tmp_path, "many", num_examples=20000, delta=1e-6)
    code, _, err = call("compose", few, many)
    assert code == 1
    assert "delta=0.002 must be less than 1 / num_examples = 5e-05 of run" in err
    assert call("compose", few, many, "--delta", "1e-5")[0] == 0
    code, out, err = call("epsilon", many, "--delta", "0.01")
    assert (code, out) == (1, "")
    assert "delta=0.01 must be less than 1 / num_examples = 5e-05 of run" in err


def test_an_empty_relation_is_not_the_default(call):
    run = ("--noise-multiplier", 1, "--sampling-prob", 0.1, "--steps", 1, "--delta", "1e-5")
    code, _, err = call("epsilon", *run, "--neighboring", "")
    assert code == 1
    assert "neighboring must be one of" in err


def test_guarantees_that_add_up_to_nothing():
    with pytest.raises(ResourceLimit, match="no finite bound"):
        epsilon([(ApproximateDP(epsilon=1, delta=0.5), 2)], 0.1, "replace_one")


def test_what_must_be_known_beside_an_epsilon_is_said(call, tmp_path):
    path = make_ledger(tmp_path, "torn.jsonl")
    path.write_bytes(path.read_bytes()[:-50])
    code, out, err = call("epsilon", path, "--json")
    assert (code, json.loads(out)["delta"], err.count("\n")) == (0, 1e-5, 1)
    assert "last line is unfinished" in err
    path = make_ledger(tmp_path, "going.jsonl")
    with Ledger.open(path):
        code, _, err = call("delta", path, "--epsilon", "1")
        assert (code, "still writing it" in err) == (0, True)
    with Ledger.open(path) as ledger:
        ledger.taint("seeded", "a test")
    other = make_ledger(tmp_path, "other.jsonl")
    for command in (["epsilon", path], ["delta", path, "--epsilon", "1"], ["compose", path, other]):
        code, out, err = call(*command)
        assert (code, out, err.count("\n")) == (1, "", 1)
        assert "is tainted (seeded): nothing can be claimed" in err


DEEP = '{"type":"ComposedDpEvent","events":[' * 100_000


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ("", "is empty"),
        ("[1]", "neither a ledger nor an event file"),
        ('{"a": 1}', "neither a ledger nor an event file"),
        ('{"type": "GaussianDpEvent",', "not valid JSON"),
        ("\x89PNG", "neither a ledger nor an event file"),
        (DEEP, "nested too deep"),
        ('{"type": "GaussianDpEvent", "noise_multiplier": NaN}', "NaN"),
        ('{"type": "GaussianDpEvent", "noise_multiplier": Infinity}', "noise_multiplier must be finite"),
        ('{"type": "GaussianDpEvent", "noise_multiplier": 1e999}', "noise_multiplier must be finite"),
        ('{"type": "GaussianDpEvent", "noise_multiplier": 1, "noise_multiplier": 9}', "occurs twice"),
        ({**GAUSSIAN, "noise_multiplier": True}, "must be a number, not True"),
        ({**GAUSSIAN, "noise_multiplier": -1}, "at least 0, not -1"),
        ({**GAUSSIAN, "x": 1}, "unknown fields: 'x'"),
        ({**STEP, "sampling_probability": 1.5}, "sampling_probability must be in [0, 1], not 1.5"),
        ({"type": "os.system"}, "'os.system'"),
        ({**RUN, "count": 10**30}, "count must be at most"),
        (
            {"type": "SampledWithReplacementDpEvent", "source_dataset_size": 9, "sample_size": 2, "event": GAUSSIAN},
            "no",
        ),
    ],
)
def test_a_bad_file_is_one_sentence(call, file, content, word):
    code, out, err = call("epsilon", "--event", file(content), "--delta", "1e-5", "--json")
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert word in err


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["epsilon"], "exactly one"),
        (["epsilon", "--noise-multiplier", "1", "--delta", "1e-5"], "--sampling-prob, --steps must be given"),
        (["epsilon", "nowhere.jsonl", "--noise-multiplier", "1"], "exactly one"),
        (["epsilon", "--noise-multiplier", "1", "--sampling-prob", "0.1", "--steps", "5"], "--delta must be given"),
        (["epsilon", "--noise-multiplier", "1", "--sampling-prob", "0.1", "--steps", "0", "--delta", "1e-5"], "steps"),
        (["delta", "--noise-multiplier", "1", "--sampling-prob", "0.1", "--steps", "5", "--epsilon", "-1"], "epsilon"),
        (["epsilon", "/"], "is a folder"),
    ],
)
def test_bad_flags_are_one_sentence(call, arguments, word):
    code, _, err = call(*arguments)
    assert code == 1
    assert err.startswith("error: ")
    assert word in err


def test_an_event_under_a_relation_it_does_not_have(call, file):
    tree = {"type": "SingleEpochTreeAggregationDpEvent", "noise_multiplier": 8, "step_counts": 1024}
    code, _, err = call("epsilon", "--event", file(tree), "--delta", "1e-5")
    assert (code, "MatrixMechanism cannot be accounted for" in err) == (1, True)
    code, out, _ = call("epsilon", "--event", file(tree), "--delta", "1e-5", "--neighboring", "zero_out", "--json")
    assert json.loads(out)["epsilon"]["upper"] == pytest.approx(1.61796, rel=1e-5)
