"""A file that is named as public and holds private rows is refused, whatever its columns are."""

import json

import pytest
import workbench
from transformers import AutoTokenizer

from dpsb import run
from dpsb.basis.sources import columns_read, read_public
from dpsb.data import Columns, DataError, Table
from dpsb.shared_rows import PublicRows, check_not_shared, public_rows, stated_rows

pytestmark = pytest.mark.usefixtures("quick_calibration")


def shared_with_private(tmp_path, kind, name):
    private = workbench.rows(task=kind)
    strange = [{key: f"{value} of somebody else" for key, value in row.items() if key != "label"} for row in private]
    longest = sorted(private, key=lambda row: -min(len(text) for key, text in row.items() if key != "label"))
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in [*strange, *longest[:3], {"text": ""}]))
    return path


@pytest.mark.parametrize("kind", ["classification", "causal-lm", "pairs"])
@pytest.mark.parametrize("how", ["basis=public", "basis=hybrid", "warm_start", "precondition"])
def test_a_public_file_with_private_rows_is_refused(tmp_path, kind, how):
    path = shared_with_private(tmp_path, kind, "secret.jsonl")
    name, _, basis = how.partition("=")
    task = "classification" if kind == "classification" else "causal-lm"
    changes = {name: f"{basis}:{path}" if basis else str(path), "data": str(workbench.data_file(kind))}
    changes |= {"warm_start_epochs": 1} if how == "warm_start" else {}
    with pytest.raises(DataError) as caught:
        run.fine_tune(workbench.run_config(tmp_path / "run", task, **changes))
    assert "3 of the 64 rows" in str(caught.value)
    assert not any(word in str(caught.value) for word in workbench.CANARIES)
    assert not (tmp_path / "run").exists()


LONG = ["a text of some length", "another one of some length"]


def refused(private, public, task="classification", match="1 of the 2 rows of q, named as public"):
    """Whether the check sees that rows of one are in the other."""
    stated = public_rows(Table("q", public), Columns(), task)
    with pytest.raises(DataError, match=match):
        check_not_shared(Table("p", private), [stated], Columns(), task)


def passes(private, public, task="classification"):
    stated = public_rows(Table("q", public), Columns(), task)
    check_not_shared(Table("p", private), [stated], Columns(), task)


def test_short_texts_are_nobodys_own():
    private = {"text": ["ok", "thanks", "a  text of\nsome length"], "label": ["x", "y", "x"]}
    passes(private, {"text": ["ok", "thanks"]})
    refused(private, {"text": ["a text of some length ", "ok"], "label": ["y", "y"]})


@pytest.mark.parametrize("more", ["text_b", "answer"])
def test_a_public_file_with_further_columns_hides_no_private_row(more):
    texts = [LONG[0], "nobody's own text at all"]
    refused({"text": LONG}, {"text": texts, more: ["thanks", "no"]})
    refused({"text": LONG}, {"text": texts, more: ["thanks", None]})


def test_a_private_file_with_further_columns_hides_no_row_of_it():
    refused({"text": LONG, "context": ["where it was said", "when"]}, {"text": [LONG[0], "nobody's own text at all"]})
    private = {"prompt": ["what was it", "and then"], "completion": LONG}
    refused(private, {"text": ["nobody's own text at all", LONG[1]]}, "causal-lm")


@pytest.mark.parametrize("names", [("prompt", "completion"), ("instruction", "label"), ("completion", "target")])
def test_a_chat_file_is_compared_where_a_classifier_takes_it_for_texts(names):
    """Such a file may have no column of text for a classifier, whose basis then comes from its prompts."""
    public = {names[0]: [LONG[0], "nobody's own text at all"], names[1]: ["x", "y"]}
    refused({"text": LONG, "label": ["x", "y"]}, public)


@pytest.mark.parametrize("column", ["source", "input"])
def test_a_column_that_a_language_model_is_not_given_hides_nothing(column):
    """`source` is a usual name of a prompt, but without a completion it is none."""
    private = {"text": LONG, column: ["imap", "imap"]}
    refused(private, {"text": [LONG[0], "nobody's own text at all"]}, "causal-lm")
    refused(private, {"text": [LONG[0], "nobody's own text at all"], column: ["web", "web"]}, "causal-lm")
    pairs = {"prompt": LONG, "completion": ["yes", "no"]}
    public = {"prompt": [LONG[0], "nobody's own"], "completion": ["yes", "no"]}
    refused({"text": ["x", "y"], **pairs}, public, "causal-lm")


SAID = "Summarise the following text."


def summaries(count, of=SAID):
    return {"prompt": [of] * count, "completion": [f"{LONG[0]}, number {i}" for i in range(count)]}


def test_an_instruction_is_nobodys_own_where_a_row_has_no_more_to_it():
    """A private row without an answer is that instruction and no more, and so is such a public row."""
    private = {"prompt": [SAID] * 2, "completion": ["a summary", None]}
    passes(private, summaries(20), "causal-lm")
    refused(private, summaries(19), "causal-lm", match="19 of the 19 rows")
    refused({"text": [SAID]}, summaries(20), "causal-lm", match="20 of the 20 rows")
    without = {"prompt": [SAID] * 21, "completion": [*summaries(20)["completion"], None]}
    passes({"prompt": [SAID], "completion": ["a summary"]}, without, "causal-lm")
    refused({**private, "completion": ["a summary", f"{LONG[0]}, number 7"]}, summaries(20), "causal-lm", "1 of the 20")
    several = {
        name: cells + summaries(20, "Say it in other words, please.")[name] for name, cells in summaries(20).items()
    }
    passes(private, several, "causal-lm")


def test_equal_rows_are_no_instruction():
    private = {"prompt": [SAID], "completion": [None]}
    refused(private, {"prompt": [SAID] * 30, "completion": ["a summary"] * 30}, "causal-lm", match="30 of the 30 rows")
    refused(
        {"text": LONG, "text_b": [None, "yes"]}, {"text": [LONG[0]] * 2, "text_b": ["one", "two"]}, match="2 of the 2"
    )


def test_columns_that_are_given_by_name_are_compared():
    columns = Columns(text="said", label="kind")
    public = public_rows(Table("q", {"said": [LONG[0]], "text": ["x"], "kind": ["a"]}), columns, "classification")
    usual = public_rows(Table("q", {"sentence": [LONG[0]]}), columns, "classification")
    private = Table("p", {"said": LONG, "text": ["x", "y"], "kind": ["a", "b"]})
    fine = public_rows(Table("r", {"text": ["nobody's own text at all"]}), columns, "classification")
    for stated in (public, usual):
        with pytest.raises(DataError, match="1 of the 1 rows of q"):
            check_not_shared(private, [fine, stated], columns, "classification")


def test_lone_surrogates_and_exactly_twenty_characters_are_compared():
    refused({"text": ["x" * 20]}, {"text": ["x" * 20, "y"]})
    passes({"text": ["x" * 19]}, {"text": ["x" * 19, "y"]})
    refused({"text": ["x" * 20 + "\ud800"]}, {"text": ["x" * 20 + "\ud800", "y"]})


def test_the_message_says_how_many_texts_are_in_question():
    private = {"text": [LONG[0], "x"]}
    match = r"2 of the 2 rows of q.*distinct texts: 1\).*leave them out of the private data"
    refused(private, {"text": [LONG[0]] * 2, "text_b": ["one", "two"]}, match=match)
    refused(private, {"text": [LONG[0], LONG[0] + " "]}, match=match)


LAYOUTS = [
    ("text", "label"),
    ("text", "text_b", "label"),
    ("text", "source", "label"),
    ("prompt", "completion"),
    ("prompt", "label"),
    ("completion",),
    ("text", "prompt", "completion"),
    ("instruction", "output", "label"),
    ("prompt", "answer"),
    ("instruction", "context", "label"),
    ("context", "label"),
    ("completion", "text_b"),
]


@pytest.mark.parametrize("task", ["classification", "causal-lm"])
@pytest.mark.parametrize("names", LAYOUTS)
def test_what_is_compared_is_what_a_public_file_gives_the_model(task, names):
    """Every column gets a word of its own; those that turn up in the tokens are the columns that are compared."""
    words = dict(zip(names, workbench.WORDS[10:], strict=False))
    table = Table("q", {name: [word] * 2 for name, word in words.items()})
    folder = workbench.bert_folder() if task == "classification" else workbench.llama_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    try:
        found = read_public(table, task, Columns(), tokenizer, ("x", "y"), workbench.PADDED)
    except DataError:
        assert not columns_read(table, Columns(), task)
        passes({"text": LONG}, table.columns, task)  # the sentence that says so comes later
        return
    seen = tokenizer.decode(found.examples[0]["input_ids"]).split()
    assert {name for name, word in words.items() if word in seen} == set(columns_read(table, Columns(), task))


def test_pairs_that_have_one_sentence_in_common_are_other_rows():
    private = {"text_a": ["a premise of some length"], "text_b": ["a hypothesis of some length"]}
    passes(private, {"text_a": ["a premise of some length"], "text_b": ["some other hypothesis of it"]})


STATED = {"source": "q", "rows": 1, "digests": [["a" * 64, ""]]}


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"rows": 2}, "it states 2 rows"),
        ({"digests": [["a"] * 4]}, "row 0 is not a list of 1 to 3 digests"),
        ({"digests": ["a" * 64]}, "row 0 is not a list"),
        ({"digests": [[]]}, "row 0 is not a list"),
        ({"digests": None}, "it states 1 rows"),
        ({"source": None}, "its source is None"),
        ({"further": 1}, "expected source, rows, digests"),
    ],
)
def test_digests_that_a_server_states_are_as_many_as_its_rows(changes, match):
    """So that the number of rows says how many texts a silo would be asked about."""
    assert stated_rows(STATED) == PublicRows("q", 1, [["a" * 64, ""]])
    with pytest.raises(ValueError, match=match):
        stated_rows({**STATED, **changes})
