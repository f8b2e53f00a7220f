"""Every committed trial is still found: its description gives it back, under the hash in its pack."""

import collections
import importlib
import json
import pathlib
import pkgutil

import pytest

import lth_companion.papers
from lth_companion.lab.store import opened, read_pack
from lth_companion.lab.trials import KINDS

for part in pkgutil.iter_modules(lth_companion.papers.__path__, "lth_companion.papers."):  # their kinds
    importlib.import_module(part.name)

PACKS = sorted((pathlib.Path(__file__).parent.parent / "figures").glob("*/*/trials.jsonl.xz"))


@pytest.mark.parametrize("path", PACKS, ids=lambda p: "-".join(p.parts[-3:-1]))
def test_packed_trials_keep_their_hashes(path):
    kinds = collections.Counter()
    for hash, line in read_pack(path).items():
        identity = json.loads(opened(line))["trial"]
        trial = KINDS[identity["kind"]].model_validate(identity["fields"])
        assert trial.hash == hash, f"{identity} was {hash}, and is {trial.hash}: {trial.identity['versions']}"
        kinds[identity["kind"]] += 1
    assert kinds and sum(kinds.values()) == len(read_pack(path))


def test_there_are_packs():
    assert sum(len(read_pack(p)) for p in PACKS) >= 7087
