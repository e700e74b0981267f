"""Keys of secure sums in a deployment: each silo's own, and the others' from hand to hand."""

import json
from dataclasses import replace

import pytest
import torch
import workbench
from test_federated_deployment import carry, command, config, free_ports, invoke, start_silos, stop

from dpsb.federated.calibrate import policy_text
from dpsb.federated.checks import FederatedError
from dpsb.federated.config import read_federation
from dpsb.federated.secure.keys import PUBLIC_NAME, add_peers, known_key, make_key, read_public
from dpsb.federated.secure.masks import KEY_NAME, SecureSumError, public_of
from dpsb.federated.server import load_state
from dpsb.federated.spec import SiloPolicy, read_policy
from dpsb_accounting import Ledger, PoissonSkellam, epsilon, verify

NAMES = ("north", "south", "west")
SECURE = """
labels = "ham,spam"
epsilon = 3.0
expected_batch_size = 16
max_length = 16

[federation]
model = "secagg"
noise = "skellam"
server_optimizer = "sgd"
rounds = 1
local_steps = 1
"""


def settings(tmp_path):
    return config(tmp_path, f'model = "{workbench.bert_folder()}"\n{SECURE}')


@pytest.fixture
def folders(tmp_path):
    """What init would give each silo, as far as keys are concerned."""
    content = {
        "settings": read_federation(settings(tmp_path), str(tmp_path / "fed"), needs_data=False).to_json(),
        "basis": {"kind": "weight_svd", "access": "data_free"},
    }
    found = {}
    for name in NAMES:
        folder = found[name] = tmp_path / name
        folder.mkdir()
        policy = SiloPolicy(silo=name, max_epsilon=3.0, delta=1e-3, models=["secagg"], clients=3)
        (folder / "policy.toml").write_text(policy_text(policy) + "# Our own remark.\n")
        (folder / "federation.json").write_text(json.dumps(content))
        (folder / "silo.toml").write_text('data = "mail.parquet"\n')
    return found


def publics(folders, *names):
    return [folders[name] / PUBLIC_NAME for name in names]


def test_each_makes_its_own_key_and_adds_those_of_the_others(folders):
    for folder in folders.values():
        make_key(folder)
        assert (folder / KEY_NAME).stat().st_mode & 0o777 == 0o600
    keys = {name: public_of(known_key(folder)).hex() for name, folder in folders.items()}
    assert dict(map(read_public, publics(folders, *NAMES))) == keys
    assert len(set(keys.values())) == 3
    before = read_policy(folders["north"] / "policy.toml")
    one = add_peers(folders["north"], publics(folders, "west"), NAMES)
    both = add_peers(folders["north"], publics(folders, "west", "south", "north"), NAMES)
    assert (dict(one.peers), dict(both.peers)) == (
        {"west": keys["west"]},
        {"west": keys["west"], "south": keys["south"]},
    )
    path = folders["north"] / "policy.toml"
    assert read_policy(path) == both == replace(before, peers=both.peers), "no limit has changed"
    assert "# Our own remark." in path.read_text()
    for folder in folders.values():
        assert known_key(folder).hex() not in "".join(
            file.read_text() for file in folder.iterdir() if file.name != KEY_NAME
        )


def test_the_commands_say_what_to_do_next(folders):
    made = invoke("key", folders["north"])
    assert made.exit_code == 0, made.output
    key = public_of(known_key(folders["north"])).hex()
    assert f"north {key}" in made.output
    assert "not by way of the server" in made.output
    for name in ("south", "west"):
        assert invoke("key", folders[name]).exit_code == 0
    south, west = publics(folders, "south", "west")
    assert "still missing: west" in invoke("key", folders["north"], "--peer", south).output
    done = invoke("key", folders["north"], "--peer", south, "--peer", west)
    assert "the public keys of all silos are there" in done.output
    again = invoke("key", folders["north"])
    assert again.exit_code == 1
    assert "delete both and make the key again" in again.stderr


def test_a_silo_does_not_start_without_its_key_or_those_of_all_others(folders):
    silo = folders["north"]
    assert "holds no sum.key; make it on the silo's own machine" in invoke("silo", silo).stderr
    for folder in folders.values():
        make_key(folder)
    assert "lacks the public keys of south, west; get them from these silos" in invoke("silo", silo).stderr
    add_peers(silo, publics(folders, "south"), NAMES)
    assert "lacks the public keys of west;" in invoke("silo", silo).stderr
    add_peers(silo, publics(folders, "west"), NAMES)
    assert "mail.parquet" in invoke("silo", silo).stderr, "now it goes on to its data"
    (silo / KEY_NAME).write_bytes(b"short")
    assert "has 5 bytes instead of 32" in invoke("silo", silo).stderr


def test_keys_that_came_with_the_folder_are_not_taken(folders):
    """A server that makes a silo's key, or hands out its own as another silo's, would read what the silo masks."""
    (folders["north"] / KEY_NAME).write_bytes(bytes(32))
    with pytest.raises(FederatedError, match="whoever made it can read what this silo masks"):
        make_key(folders["north"])
    path = folders["south"] / "policy.toml"
    path.write_text(path.read_text() + f'\n[peers]\nnorth = "{"a" * 64}"\n')
    with pytest.raises(FederatedError, match="public keys of north before this silo has a key of its own"):
        make_key(folders["south"])
    assert not (folders["south"] / KEY_NAME).exists()


def test_a_link_in_the_keys_place_is_not_followed(folders, tmp_path, monkeypatch):
    """Nor is a key that comes there while the silo makes its own."""
    silo, elsewhere = folders["north"], tmp_path / "elsewhere"
    (silo / KEY_NAME).symlink_to(elsewhere)
    with pytest.raises(FederatedError, match="is there already"):
        make_key(silo)
    assert not elsewhere.exists()
    monkeypatch.setattr("os.path.lexists", lambda _path: False)
    elsewhere.write_bytes(bytes(32))
    with pytest.raises(FederatedError, match="is there already"):
        make_key(silo)
    assert not (silo / PUBLIC_NAME).exists()
    assert sorted(path.name for path in silo.iterdir()) == ["federation.json", "policy.toml", "silo.toml", KEY_NAME]


def test_a_key_is_there_whole_or_not_at_all(folders, monkeypatch):
    silo = folders["north"]

    def dies(_descriptor):
        raise OSError("no power")

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", dies)
        with pytest.raises(OSError, match="no power"):
            make_key(silo)
    assert not list(silo.glob("*sum*"))
    make_key(silo)
    assert (silo / KEY_NAME).stat().st_mode & 0o777 == 0o600
    assert len(known_key(silo)) == 32


def test_a_key_in_place_of_another_is_refused(folders, tmp_path):
    for folder in folders.values():
        make_key(folder)
    silo = folders["north"]
    add_peers(silo, publics(folders, "south"), NAMES)
    before = (silo / "policy.toml").read_bytes()
    other = tmp_path / "other.pub"
    west = public_of(known_key(folders["west"])).hex()
    for content, said in (
        (f'south = "{"b" * 64}"', "There are two public keys of silo 'south'"),
        (f'north = "{"b" * 64}"', "There are two public keys of silo 'north'"),
        (f'east = "{west}"', "the public key of silo 'east', which the federation does not know"),
        (f'west = "{read_public(publics(folders, "south")[0])[1]}"', "the same public key for two silos"),
        ('west = "short"', "the public key of 'west'"),
        (f'west = "{west}"\nsouth = "{west}"', "cannot be read as a silo's public key"),
        ("west", "cannot be read as a silo's public key"),
    ):
        other.write_text(content)
        with pytest.raises(FederatedError, match=said):
            add_peers(silo, [other], NAMES)
        assert (silo / "policy.toml").read_bytes() == before


def test_a_policy_in_another_form_is_left_alone(folders):
    for folder in folders.values():
        make_key(folder)
    path = folders["north"] / "policy.toml"
    south = read_public(publics(folders, "south")[0])[1]
    path.write_text(path.read_text() + f'peers = {{ south = "{south}" }}\n')
    with pytest.raises(FederatedError, match=r"put the keys under \[peers\] by hand"):
        add_peers(folders["north"], publics(folders, "west"), NAMES)


def test_a_key_is_not_made_in_the_middle_of_a_run(tmp_path):
    with pytest.raises(SecureSumError, match=r"holds no sum\.key"):
        known_key(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_secure_sum_over_tls(tmp_path):
    """Three silos whose keys go from hand to hand: the server knows none, and what it opens is in whole numbers."""
    port, *node_ports = free_ports(4)
    fed, silos, servers = tmp_path / "fed", {}, []
    done = invoke("init", "--config", settings(tmp_path), "--out", fed, "--port", port)
    assert done.exit_code == 0, done.output
    assert "exchanges public keys with the other silos (`dpsb federate key`)" in " ".join(done.output.split())
    carry(tmp_path, fed, node_ports)
    for name in NAMES:
        assert invoke("key", tmp_path / name).exit_code == 0
    for name in NAMES:
        others = [option for other in NAMES if other != name for option in ("--peer", tmp_path / other / PUBLIC_NAME)]
        assert invoke("key", tmp_path / name, *others).exit_code == 0
    try:
        start_silos(tmp_path, silos)
        serve = ("server", fed, "--port", port, "--timeout", 240, "--patience", 240, "--json")
        servers.append(server := command(*serve, start_new_session=True))
        output, _ = server.communicate(timeout=600)
        assert server.returncode == 0, output
    finally:
        texts = stop(silos, *servers)
    report, state = json.loads((fed / "report.json").read_text()), load_state(fed)
    assert [record.silos for record in state.history] == [NAMES], texts
    assert report["claim"] is True
    events = set()
    for name in NAMES:
        (path,) = (tmp_path / name).glob("runs/*/ledger.jsonl")
        assert verify(path).ok
        record = Ledger.read(path)
        assert record.charged("train") == record.plan.steps == 1
        events.add(record.plan.train.event)
    (event,) = events
    assert isinstance(event, PoissonSkellam)
    claimed = epsilon([(event, 1)], record.plan.delta, record.plan.neighboring).upper
    assert report["epsilon"]["upper"] == pytest.approx(claimed, rel=1e-6)
    assert claimed <= 3.0
    divisor = sum(terms.expected_batch_size for terms in state.terms.silos.values())
    for name, mean in state.moments.items():  # without momentum: the last round's noisy mean gradient
        whole = mean * divisor * (state.terms.clip_steps / state.terms.l2_clip_norm)
        torch.testing.assert_close(whole, whole.round(), rtol=0, atol=1e-6, msg=name)
        assert len(whole.round().unique()) > whole.numel() / 2
    secrets = [known_key(tmp_path / name) for name in NAMES]
    kept = [path.read_bytes() for path in fed.rglob("*") if path.is_file()]
    assert not any(form in content for key in secrets for form in (key, key.hex().encode()) for content in kept)
