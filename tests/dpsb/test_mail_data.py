"""The embedded mail data set, and the script that builds it."""

import hashlib
import importlib.resources
import importlib.util
import json
import re
import tarfile
from email import message_from_string
from pathlib import Path

import pyarrow.parquet as pq
import pytest

SPLITS = ("train", "validation", "test")
MAIL = importlib.resources.files("dpsb") / "mail"
BUILDER = Path(__file__).resolve().parents[2] / "examples" / "build_mail.py"


@pytest.fixture(scope="module")
def tables():
    return {name: pq.read_table(str(MAIL / f"{name}.parquet")) for name in SPLITS}


@pytest.fixture(scope="module")
def builder():
    if not BUILDER.exists():
        pytest.skip("an installed package has no examples/")
    spec = importlib.util.spec_from_file_location("build_mail", BUILDER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_schema_counts_and_balance(tables):
    for name, rows in {"train": 3000, "validation": 400, "test": 800}.items():
        table = tables[name]
        assert table.column_names == ["text", "label", "group"]
        assert all(str(t) == "string" for t in table.schema.types)
        assert all(column.null_count == 0 for column in table.columns)
        assert rows <= table.num_rows <= 1.2 * rows
        labels = table["label"].to_pylist()
        assert set(labels) == {"ham", "spam"}
        assert 0.22 <= labels.count("spam") / len(labels) <= 0.27


def test_the_package_data_stay_small():
    assert {entry.name for entry in MAIL.iterdir()} >= {*(f"{s}.parquet" for s in SPLITS), "LICENSE-DATA.md"}
    assert sum(len(entry.read_bytes()) for entry in MAIL.iterdir() if entry.is_file()) <= 3_000_000


def test_no_text_occurs_twice(tables):
    texts = [re.sub(r"\W+", " ", t).lower() for s in SPLITS for t in tables[s]["text"].to_pylist()]
    assert len(set(texts)) == len(texts)


def test_texts_are_masked_and_cut(tables):
    for table in tables.values():
        for text in table["text"].to_pylist():
            assert not re.search(r"\w@\w|https?://[\w.]{3}|\d{9}|mailman/listinfo|BEGIN PGP SIG", text)
            assert 20 <= len(text) <= 2500
            assert text == text.strip()
            assert text.count("\n") <= 1


def test_groups_are_short_hashes_of_more_than_one_row(tables):
    groups = [g for table in tables.values() for g in table["group"].to_pylist()]
    assert all(re.fullmatch("[0-9a-f]{12}", g) for g in groups)
    assert 500 < len(set(groups)) < len(groups) / 2


def test_the_licence_note_has_the_counts(tables):
    note = (MAIL / "LICENSE-DATA.md").read_text(encoding="utf-8")
    assert "PDDL" in note
    assert "CC0" in note
    for table in tables.values():
        assert f"{table.num_rows:,}" in note


PLAIN = """\
From: A Person <a.person@lists.example.org>
Subject: =?iso-8859-1?Q?Re:_[ILUG]_Caf=E9?=
Content-Type: text/plain; charset=no-such-charset

Write to me@example.com or call (555) 123-4567, see http://example.com/x?token=1.
> On Monday you wrote   that
> --
> quoted signature

I agree.
--\x20
A Person, +44 20 7946 0000
_______________________________________________
Some-list mailing list
Some-list@example.org
"""

HTML = """\
From: nobody
Subject: Offer
MIME-Version: 1.0
Content-Type: multipart/alternative; boundary="b"

--b
Content-Type: text/html; charset="utf-8"
Content-Transfer-Encoding: quoted-printable

<html><head><style>p {color: red}</style></head><body><p>Fish &amp; ch=
ips<br>now</p><script>alert(1)</script><!-- hidden --></body></html>
--b--
"""


def test_a_plain_mail(builder):
    text = builder.text_of(message_from_string(PLAIN))
    assert text == ("Re: Café\nWrite to <email> or call <number>, see <url> > On Monday you wrote that I agree.")


def test_an_html_mail(builder):
    assert builder.text_of(message_from_string(HTML)) == "Offer\nFish & chips now"


@pytest.mark.parametrize("body", [
    "-----BEGIN PGP SIGNED MESSAGE-----\nHash: SHA1\n\nkept\n-----BEGIN PGP SIGNATURE-----\nabc\n"
    "-----END PGP SIGNATURE-----\n",
    "--------------- Yahoo! Groups Sponsor ----------~-->\nbuy\n---------------------------~->\nkept\n\n"
    "To unsubscribe from this group, send an email to:\nx@y.z\n",
    "kept\n\n-----------------------------\nThis sf.net email is sponsored by\nad\n",
    "URL: http://example.org/\nDate: Not supplied\n\nkept\n",
    "SPAM: ---- Start SpamAssassin results\nSPAM: hits\nkept\n",
])  # fmt: skip
def test_what_is_not_content_goes(builder, body):
    assert builder.text_of(message_from_string(f"Subject: s\n\n{body}")) == "s\nkept"


def test_unreadable_bytes_do_not_fail(builder):
    assert builder.decode(b"caf\xe9", "utf-8") == "café"
    assert builder.decode(b"caf\xc3\xa9", None) == "café"
    assert builder.decode(b"abc", "x\0y") == "abc"
    broken = message_from_string("Subject: =?x-bad?B?!!!?=\nContent-Type: multipart/mixed\n\nno boundary")
    assert isinstance(builder.text_of(broken), str)


def _write_package(folder: Path, mails: list[tuple[str, str]]) -> None:
    for i, (group, text) in enumerate(mails):
        path = folder / "data" / group / f"{i:05}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()
        path.write_text(json.dumps({"id": str(i), "group": group, "text": text,
                                    "checksum": {"type": "MD5", "value": digest}}))  # fmt: skip


def _mails(n: int) -> list[tuple[str, str]]:
    def body(seed: str) -> str:
        return " ".join(hashlib.sha256(f"{seed}{k}".encode()).hexdigest().translate(
            str.maketrans("0123456789", "ghijklmnop"))[:6] for k in range(40))  # fmt: skip

    head = "From: x@host{}.example\nSubject: mail\n\n{}\n"
    return [("easy-ham-1" if i % 4 else "spam-1", head.format(i % 3, body(str(i)))) for i in range(n)]


def test_building_removes_near_duplicates_and_hides_the_domain(builder, tmp_path):
    mails = _mails(40)
    mails += [(group, text + "one more line\n") for group, text in mails[:2]] + [("spam-2", "Subject: x\n\n")]
    _write_package(tmp_path / "package", mails)
    figures = builder.build(tmp_path / "package", tmp_path / "a", b"salt")
    assert (figures["read"], figures["empty"], figures["near_duplicates"], figures["kept"]) == (43, 1, 2, 40)
    assert [figures[s]["rows"] for s in SPLITS] == [28, 4, 8]
    assert [figures[s]["spam"] for s in SPLITS] == [7, 1, 2]

    with tarfile.open(tmp_path / "p.tgz", "w:gz") as archive:
        archive.add(tmp_path / "package", "package")
    builder.build(tmp_path / "p.tgz", tmp_path / "b", b"salt")
    builder.build(tmp_path / "package", tmp_path / "c", b"other")
    for name in SPLITS:
        a, b, c = (pq.read_table(tmp_path / d / f"{name}.parquet") for d in "abc")
        assert a.equals(b)
        assert a.drop(["group"]).equals(c.drop(["group"]))
        assert not set(a["group"].to_pylist()) & set(c["group"].to_pylist())
    assert len(set(pq.read_table(tmp_path / "a" / "train.parquet")["group"].to_pylist())) == 3


def test_a_pair_of_both_classes_is_dropped(builder, tmp_path):
    mails = _mails(40)
    group, text = mails[0]
    _write_package(tmp_path / "package", [*mails, ("hard-ham-1", text + "again\n")])
    assert group == "spam-1"
    assert builder.build(tmp_path / "package", tmp_path / "out", b"s")["kept"] == 39


@pytest.mark.slow
def test_an_independent_search_finds_no_near_duplicates_between_splits(tables):
    text = pytest.importorskip("sklearn.feature_extraction.text")
    texts = [t for s in SPLITS for t in tables[s]["text"].to_pylist()]
    part = [s for s in SPLITS for _ in range(tables[s].num_rows)]
    vectors = text.TfidfVectorizer(analyzer="char_wb", ngram_range=(4, 5), min_df=2, sublinear_tf=True,
                                   max_features=200_000).fit_transform(texts)  # fmt: skip
    close = (vectors @ vectors.T > 0.9).tocoo()
    pairs = [(i, j) for i, j in zip(close.row, close.col, strict=True) if i < j and part[i] != part[j]]
    assert len(pairs) <= 2  # counted and explained in LICENSE-DATA.md
