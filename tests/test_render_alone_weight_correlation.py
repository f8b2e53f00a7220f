"The committed figures of the weight-correlation notebooks that show more than branches are drawn from their trials alone (see `rendering`)."
import pytest
from rendering import differing, guarded, refusals, render

NOTEBOOKS = ["weight_correlation/01_what_rp_measures", "weight_correlation/05_table_1"]

CALLS = """
from lth_companion.papers.weight_correlation import AgreementTrial, BranchTrial, initial, trained
from lth_companion.training.models import create
small = dict(data="digits", width=.1)
for call in (lambda: create("lenet-300-100"), lambda: initial(BranchTrial(**small)), lambda: trained(BranchTrial(**small)), lambda: AgreementTrial.run_group([AgreementTrial(**small)])):
    try: print("went through", call())
    except RuntimeError as error: print(error)
"""

def test_the_guard_refuses(tmp_path):
    said = refusals(CALLS, guarded(tmp_path))
    assert len(said) == 4 and all("was called while a figure was drawn" in line for line in said)

@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    out = tmp_path_factory.mktemp("figures")
    return out, render(NOTEBOOKS, guarded(tmp_path_factory.mktemp("guard")), out)

@pytest.mark.slow
@pytest.mark.timeout(600)      # all are rendered in the first one's time: half a minute on two idle cores
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_every_table_and_picture_comes_from_trials(rendered, name):
    out, said = rendered
    assert (out / "laptop" / name / "provenance.json").exists(), said[-2000:]
    assert not differing(name, out)
