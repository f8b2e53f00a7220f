"Figures: the right marks, the same bytes in any process, nothing global changed."

import hashlib
import os
import pathlib
import subprocess
import sys

import matplotlib
import numpy as np
import pandas as pd
import pytest

from lth_companion.lab import plots as p
from lth_companion.lab import style


def rows():
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        [
            dict(scorer=s, density=d, seed=i, accuracy=90 + k + rng.normal())
            for k, s in enumerate(["snip", "synflow", "magnitude>snip", "once(snip)>synflow"])
            for d in (0.004, 0.005, 0.01, 0.5)
            for i in range(3)
        ]
    )


def cells():
    names = ["snip", "synflow", "magnitude"]
    return pd.DataFrame(
        [
            dict(first=a, second=b, value=10.0 * i + j, kind="same" if i == 0 and j < 2 else f"{i}{j}")
            for i, a in enumerate(names)
            for j, b in enumerate(names)
        ]
    )


def contrasts():
    return pd.DataFrame(
        {
            "label": ["a", "b"],
            "mean": [1.0, -0.2],
            "low": [0.5, np.nan],
            "high": [1.5, np.nan],
            "n": [20, 1],
            "reported": [2.03, np.nan],
            "noise": [0.4, 0.5],
        }
    )


def bars():
    return pd.DataFrame(
        {
            "scorer": ["snip", "snip", "synflow", "synflow"],
            "layer": ["fc1", "fc2"] * 2,
            "density": [0.01, 0.2, 0.0, 0.3],
        }
    )


FIGURES = {
    "accuracy": lambda: p.accuracy_vs_density(
        rows(), reported=pd.DataFrame({"scorer": ["snip"], "density": [0.005], "accuracy": [89.83]})
    ),
    "heat": lambda: p.heatmap(cells(), value="value", cls="kind"),
    "diverging": lambda: p.heatmap(cells(), value="value", centre=0),
    "forest": lambda: p.forest(contrasts()),
    "strip": lambda: p.strip(rows().query("density == 0.005"), connect=True, reported={"snip": 89.8}),
    "layers": lambda: p.layers(bars()),
}


def digests(folder):
    found = {}
    for name, draw in FIGURES.items():
        for path in p.savefig(draw(), pathlib.Path(folder) / f"{name}_0.005"):
            found[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def test_equal_bytes_in_separate_processes(tmp_path):
    code = "import sys, test_plots; [print(k, v) for k, v in test_plots.digests(sys.argv[1]).items()]"
    said = []
    for k in (1, 2):
        home = tmp_path / f"config{k}"
        home.mkdir()
        if k == 2:
            # a user's taste changes nothing
            (home / "matplotlibrc").write_text("font.size: 20\nsvg.fonttype: none\naxes.facecolor: red\n")
        env = os.environ | {
            "PYTHONHASHSEED": str(k),
            "MPLCONFIGDIR": str(home),
            "PYTHONPATH": os.pathsep.join(
                [str(pathlib.Path(__file__).parent), str(pathlib.Path(p.__file__).parents[1])]
            ),
        }
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / str(k))], capture_output=True, text=True, env=env, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    assert said[0] == said[1] and len(said[0].splitlines()) == 2 * len(FIGURES)
    svg = (tmp_path / "1" / "accuracy_0.005.svg").read_text()
    assert "<dc:date>" not in svg and "Matplotlib v" not in svg
    assert b"matplotlib" not in (tmp_path / "1" / "heat_0.005.png").read_bytes().lower()


@pytest.mark.parametrize("name", FIGURES)
def test_saving_again_or_after_showing_changes_nothing(tmp_path, name):
    fig, shown = FIGURES[name](), FIGURES[name]()
    first = [path.read_bytes() for path in p.savefig(fig, tmp_path / "a")]
    p.show(shown, dpi=70)
    for again, stem in ((fig, "deep/er/a"), (shown, "shown")):
        assert first == [path.read_bytes() for path in p.savefig(again, tmp_path / stem)]


def test_no_global_state(tmp_path):
    code = "; ".join(
        [
            "import sys, matplotlib, matplotlib.pyplot as plt, lth_companion.lab.plots, test_plots",
            "b = dict(matplotlib.rcParams), plt.get_backend()",
            "test_plots.digests(sys.argv[1])",
            "assert (dict(matplotlib.rcParams), plt.get_backend()) == b",
            "assert plt.get_fignums() == []",
        ]
    )
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(pathlib.Path(__file__).parent), str(pathlib.Path(p.__file__).parents[1])])
    }
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr


def test_style_ends_after_an_error():
    before = dict(matplotlib.rcParams)
    with pytest.raises(RuntimeError):
        with p.style():
            raise RuntimeError
    assert dict(matplotlib.rcParams) == before


def test_looks_differ_for_every_single_scorer_and_in_grey():
    given = p.looks(["random", "magnitude", "snip", "grasp", "synflow"])
    assert len({s["marker"] for s in given.values()}) == 5 and len({str(s["linestyle"]) for s in given.values()}) == 5
    assert min(np.diff(sorted(p.lightness(s["color"]) for s in given.values()))) > 11
    assert p.lightness("white") == pytest.approx(100, abs=0.1) and p.lightness("black") == 0


def test_all_pairs_look_different_and_do_not_depend_on_company_alone():
    singles = ["random", "magnitude", "snip", "grasp", "synflow"]
    given = p.looks([f"{a}>{b}" for a in singles for b in singles])
    assert len({(s["color"], s["marker"]) for s in given.values()}) == 25
    assert p.look("candidate") == p.look("candidate") and p.look("saw:snip magnitude>synflow U-MS") == p.look(
        "magnitude>synflow"
    )


def test_error_bars_are_t_intervals():
    from scipy import stats

    data = rows().query("scorer == 'snip' and density == 0.005")
    fig = p.accuracy_vs_density(data)
    _, _, (bar,) = fig.axes[0].containers[0]
    low, high = bar.get_segments()[0][:, 1]
    assert (low, high) == pytest.approx(stats.t.interval(0.95, 2, data["accuracy"].mean(), stats.sem(data["accuracy"])))


def test_reported_markers_are_hollow_and_only_where_measured():
    fig = p.accuracy_vs_density(
        rows().query("density < 0.1"),
        reported=pd.DataFrame({"scorer": ["snip", "snip"], "density": [0.005, 0.5], "accuracy": [89.8, 98.0]}),
    )
    hollow = [line for line in fig.axes[0].lines if line.get_markerfacecolor() == "white" and len(line.get_xdata())]
    assert len(hollow) == 1 and list(hollow[0].get_ydata()) == [89.8]


def test_heatmap_cells_classes_and_gaps():
    fig = FIGURES["heat"]()
    texts = [t.get_text() for t in fig.axes[0].texts]
    assert texts.count("a") == 2 and "22.0" in texts
    assert len(fig.axes[0].lines) == 6  # two neighbours, one outline: no line between them
    gap = p.heatmap(cells().iloc[1:], value="value", order=["snip", "synflow", "magnitude"])
    assert "–" in [t.get_text() for t in gap.axes[0].texts]


def test_constant_heatmap_and_one_row_forest_draw():
    p.heatmap(cells().assign(value=1.0), value="value")
    p.forest(contrasts().iloc[:1].drop(columns=["noise", "reported"]))


def test_forest_marks_reported_and_noise():
    ax = FIGURES["forest"]().axes[0]
    widths = [patch.get_width() for patch in ax.patches]
    assert widths == pytest.approx([0.8, 1.0])
    diamonds = [line for line in ax.lines if line.get_marker() == "D"]
    assert np.nanmax(diamonds[0].get_xdata()) == 2.03


def test_layers_mark_the_empty_one():
    ax = FIGURES["layers"]().axes[0]
    crosses = [line for line in ax.lines if line.get_marker() == "x" and len(line.get_xdata())]
    assert len(crosses) == 1 and len(crosses[0].get_xdata()) == 1


@pytest.mark.parametrize(
    "draw",
    [
        lambda: p.accuracy_vs_density(rows(), by="method"),
        lambda: p.heatmap(cells(), value="accuracy"),
        lambda: p.forest(bars()),
        lambda: p.strip(cells()),
        lambda: p.layers(cells()),
    ],
)
def test_a_missing_column_is_named(draw):
    with pytest.raises(ValueError, match="no column"):
        draw()


def test_sizes_fit_the_page():
    for draw in FIGURES.values():
        assert draw().get_size_inches()[0] in (p.COLUMN, p.TEXT / 2, p.TEXT)


def test_an_svg_does_not_hang_on_the_last_bit():
    "Another processor's arithmetic may round otherwise: neither ids nor coordinates show it."
    one = """<path id="m0123456789" d="M 1.2345678 2"/><use xlink:href="#m0123456789" x="3.00000001" transform="rotate(-0 1.2345678 2)"/>
<g clip-path="url(#pabcdef0123)"/><clipPath id="pabcdef0123"><rect x="0.1234" y="-0.0001" width="7.5" height="1"/></clipPath>"""
    two = one.replace("1.2345678", "1.2345679").replace("0123456789", "9876543210").replace("abcdef0123", "3210fedcba")
    assert style.lean(one) == style.lean(two)
    assert 'd="M 1.23 2"' in style.lean(one) and 'href="#i0" x="3"' in style.lean(one)
    assert "url(#i1)" in style.lean(one) and 'id="i1"' in style.lean(one) and 'y="0"' in style.lean(one)
