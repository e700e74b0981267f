"""Gives each of some silos its part of the embedded mail, by the senders' domains: `split_mail.py FOLDER ...`."""

import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dpsb.data import read_table
from dpsb.demo import mail_file
from dpsb.federated.split import split_table

folders = {folder.name: folder for folder in map(Path, sys.argv[1:])}
for name, part in split_table(read_table(str(mail_file("train"))), list(folders), "group", 0).items():
    data = folders[name].resolve() / "mail.parquet"
    pq.write_table(pa.table(part.columns), data)
    (folders[name] / "silo.toml").write_text(f"data = {json.dumps(str(data))}\n")
    print(f"{name}: {len(part):,} mails")
