"""The committed figures of notebooks that show more than trainings are drawn from their trials alone (see
`rendering`): every table and picture comes out as it is committed.
"""

import pytest
from rendering import ROOT, differing, guarded, refusals, render

THESIS = [
    f"learning_to_learn/{name}"
    for name in sorted(
        p.parent.name for p in (ROOT / "figures" / "laptop" / "learning_to_learn").glob("*/provenance.json")
    )
]
NOTEBOOKS = {
    "learning_to_learn": THESIS,
    "weight_correlation": ["weight_correlation/01_what_rp_measures", "weight_correlation/05_table_1"],
    "weight_recycling": [
        f"weight_recycling/{name}"
        for name in ("01_what_a_supermask_is", "02_base_methods", "04_width", "05_small", "10_storage")
    ],
}

CALLS = {  # what a notebook could call; each is refused
    "learning_to_learn": (
        """
from lth_companion.methods.scorers import snip
from lth_companion.papers.learning_to_learn import find_masks, prune, thesis, train_cohort
from lth_companion.papers.learning_to_learn_starts import StartTrial, start
from lth_companion.training import data as datasets
from lth_companion.training.models import create
trial = thesis("standard snip U-MS", .1, data="digits")
calls = [lambda: create("lenet-300-100"), lambda: datasets.load("digits"), lambda: prune(None, snip, .1, []), lambda: train_cohort([], None),
         lambda: find_masks(trial, model=0), lambda: start(trial), lambda: StartTrial.run_group([StartTrial(data="digits")])]
""",
        7,
    ),
    "weight_correlation": (
        """
from lth_companion.papers.weight_correlation import BranchTrial, initial, trained
from lth_companion.papers.weight_correlation_agreement import AgreementTrial
from lth_companion.training.models import create
small = dict(data="digits", width=.1)
calls = [lambda: create("lenet-300-100"), lambda: initial(BranchTrial(**small)), lambda: trained(BranchTrial(**small)), lambda: AgreementTrial.run_group([AgreementTrial(**small)])]
""",
        4,
    ),
    "weight_recycling": (
        """
from lth_companion.methods.supermasks import drawn
from lth_companion.papers.weight_correlation import network
from lth_companion.papers.weight_recycling import SupermaskTrial, search_recipe, settings_of
from lth_companion.papers.weight_recycling_watched import GainTrial, WatchedTrial
small = dict(data="digits", width=.1, recipe=search_recipe(2), search=settings_of("EP+Recycle", .4, 2))
calls = [lambda: network(SupermaskTrial(**small)), lambda: SupermaskTrial.run_group([SupermaskTrial(**small)]), lambda: WatchedTrial.run_group([WatchedTrial(**small)]),
         lambda: GainTrial.run_group([GainTrial(search=small["search"])]), lambda: drawn((2, 3), small["search"])]
""",
        5,
    ),
}

SAY = """
for call in calls:
    try: print("went through", call())
    except RuntimeError as error: print(error)
"""


@pytest.mark.parametrize("paper", CALLS)
def test_the_guard_refuses(paper, tmp_path):
    code, count = CALLS[paper]
    said = refusals(code + SAY, guarded(tmp_path))
    assert len(said) == count and all("was called while a figure was drawn" in line for line in said)


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    "A paper's notebooks, rendered once: their folder, and what the commands said."
    done = {}

    def of(paper):
        if paper not in done:
            out = tmp_path_factory.mktemp("figures")
            done[paper] = out, render(NOTEBOOKS[paper], guarded(tmp_path_factory.mktemp("guard")), out)
        return done[paper]

    return of


@pytest.mark.slow
# a paper's notebooks are rendered in the first one's time: about 80 s of the thesis's on two idle cores
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [name for names in NOTEBOOKS.values() for name in names])
def test_every_table_and_picture_comes_from_trials(rendered, name):
    out, said = rendered(name.split("/")[0])
    assert (out / "laptop" / name / "provenance.json").exists(), said[-2000:]
    assert not differing(name, out), said[-500:]
    assert name not in THESIS or len([p for p in (out / "laptop" / name).iterdir() if p.name != "provenance.json"]) > 3


def test_all_notebooks_of_the_thesis_are_here():
    assert len(THESIS) == 7
