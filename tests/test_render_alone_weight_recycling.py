"The committed figures of the weight-recycling notebooks that show more than searches are drawn from their trials alone (see `rendering`)."
import pytest
from rendering import differing, guarded, refusals, render

NOTEBOOKS = [f"weight_recycling/{name}" for name in ("01_what_a_supermask_is", "02_base_methods", "04_width", "05_small", "10_storage")]

CALLS = """
from lth_companion.methods.supermasks import drawn
from lth_companion.papers.weight_correlation import network
from lth_companion.papers.weight_recycling import GainTrial, SupermaskTrial, WatchedTrial, search_recipe, settings_of
small = dict(data="digits", width=.1, recipe=search_recipe(2), search=settings_of("EP+Recycle", .4, 2))
for call in (lambda: network(SupermaskTrial(**small)), lambda: SupermaskTrial.run_group([SupermaskTrial(**small)]), lambda: WatchedTrial.run_group([WatchedTrial(**small)]),
             lambda: GainTrial.run_group([GainTrial(search=small["search"])]), lambda: drawn((2, 3), small["search"])):
    try: print("went through", call())
    except RuntimeError as error: print(error)
"""

def test_the_guard_refuses(tmp_path):
    said = refusals(CALLS, guarded(tmp_path))
    assert len(said) == 5 and all("was called while a figure was drawn" in line for line in said)

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
