#!/usr/bin/env bash
# A deployment on one machine: a server and three silos, each a process with a folder of its own, over TLS on loopback.
# In earnest each runs on its party's machine, and the folders travel over a channel that both trust; docs/federated.md
# says what else changes. Needs `pip install "dpsb[train,demo,federated]"`; takes two to four minutes.
#
#   bash examples/federated_mail/deployment.sh [FOLDER [PORT]]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-fed-deployment} port=${2:-8800}
silos=(north south west)

echo "== The server makes the run: its terms, the public start, certificates, a key for each silo. It has no data."
dpsb federate init --config "$here/deployment.toml" --out "$out/server" --port "$port"

echo "== Each silo takes its folder, reads its policy, and names its own file: the mail of some senders' domains."
for silo in "${silos[@]}"; do mv "$out/server/for-silos/$silo" "$out/$silo"; done
cat "$out/north/policy.toml"
python "$here/split_mail.py" "${silos[@]/#/$out/}"

echo "== The silos start, load the model once, and wait. What they print is in $out/NAME.log."
trap 'kill $(jobs -p) 2> /dev/null || true; wait' EXIT
for silo in "${silos[@]}"; do dpsb federate silo "$out/$silo" > "$out/$silo.log" 2>&1 & done

echo "== The server runs the rounds, fetches the silos' ledgers, and writes the adapter and the report."
dpsb federate server "$out/server" --port "$port"

echo "== Each silo, or anybody who is given its ledger, recomputes what it spent."
for silo in "${silos[@]}"; do dpsb-accounting verify "$out/$silo"/runs/*/ledger.jsonl; done
