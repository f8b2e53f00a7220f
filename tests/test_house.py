"""What the files around the library promise each other: pins, packaging, notebooks, imports."""

import ast
import copy
import filecmp
import json
import math
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
FLOORS = ("", "training", "methods", "measures", "lab", "papers")  # each imports from itself and those before it
CHAPTERS = [
    p
    for floor in FLOORS
    for p in sorted((ROOT / "nbs" / floor).glob("*/00_*.ipynb" if floor == "papers" else "[0-9][0-9]_*.ipynb"))
]
# 00_ holds a paper's module
PAPERS = sorted(p for p in (ROOT / "nbs" / "papers").glob("*/[0-9][0-9]_*.ipynb") if not p.name.startswith("00_"))
MODULES = sorted(p for p in (ROOT / "lth_companion").rglob("*.py") if not p.name.startswith("_"))
named = dict(ids=lambda p: f"{p.parent.name}/{p.stem}")


def settings():
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini")
    return parser["DEFAULT"]


def wanted():
    "The direct requirements by canonical name."
    s = settings()
    found = [
        Requirement(r) for kind in ("requirements", "dev_requirements", "cluster_requirements") for r in s[kind].split()
    ]
    return {canonicalize_name(r.name): r for r in found}


def pins():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines), (
        "a line of constraints.txt is no plain pin (name==version, no local tag)"
    )
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


def cells(path):
    return json.loads(path.read_text())["cells"]


def source(cell):
    return cell["source"] if isinstance(cell["source"], str) else "".join(cell["source"])


# ---------------------------------------------------------------- pins and packaging


def test_constraints_pin_what_settings_ask_for():
    for name, requirement in wanted().items():
        assert requirement.specifier.contains(pins()[name]), f"{requirement} is pinned to {pins()[name]}"


def test_constraints_pin_everything_that_gets_installed():
    "Every package that ours needs here, however far down, has a pin, and the pin is what is installed."
    todo, seen = [("lth_companion", {"dev", "cluster"})], set()
    while todo:
        name, extras = todo.pop()
        for line in metadata.requires(name) or []:
            r = Requirement(line)
            if r.marker and not any(r.marker.evaluate({"extra": extra}) for extra in extras | {""}):
                continue
            if (key := canonicalize_name(r.name)) in seen:
                continue
            try:
                version = metadata.version(r.name)
            except metadata.PackageNotFoundError:
                continue  # torch's CUDA packages, where torch is a CPU build
            seen.add(key)
            todo.append((r.name, r.extras))
            if key in ("setuptools", "pip", "wheel") or key.startswith(("nvidia-", "cuda-", "triton")):
                continue  # torch pins its own
            assert pins().get(key) == version.partition("+")[0], (
                f"{key} {version} is here; constraints.txt says {pins().get(key)}"
            )
    assert len(seen) > 80


def test_environment_says_the_same():
    listed = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    own = dict(line.split("==") for line in listed[-1]["pip"] if "==" in line)
    assert own == {name: pins()[name] for name in wanted()}
    assert f"python={settings()['min_python']}" in listed


def test_setup_gives_every_dynamic_field():
    s, about = settings(), metadata.metadata("lth_companion")
    assert (about["Version"], about["Summary"]) == (
        s["version"],
        s["description"],
    ), "installed from other settings: run `make venv`"
    assert about.get("License-Expression") or about.get("License") == "Apache-2.0"
    assert (
        s["author"] in (about["Author"] or about["Author-email"]) and about["Requires-Python"] == ">=" + s["min_python"]
    )
    assert set(about.get_all("Provides-Extra")) == {"dev", "cluster"} and len(about.get_all("Classifier")) >= 4
    assert {canonicalize_name(Requirement(r).name) for r in about.get_all("Requires-Dist")} == set(wanted())
    points = {
        e.name: e.value for e in metadata.distribution("lth_companion").entry_points if e.group == "console_scripts"
    }
    assert points == {"lth": "lth_companion.lab.cli:main"}
    assert callable(metadata.distribution("lth_companion").entry_points["lth"].load())


def test_wheel_carries_the_tables(tmp_path):
    "A built wheel has every module and every file under tables."
    for part in ("lth_companion", "settings.ini", "setup.py", "pyproject.toml", "README.md"):
        (shutil.copytree if (ROOT / part).is_dir() else shutil.copy)(ROOT / part, tmp_path / part)
    code = "from setuptools import build_meta; build_meta.build_wheel('out')"
    (tmp_path / "out").mkdir()
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    if "No module named" in done.stderr:
        pytest.skip("setuptools is not installed here; pip brings its own when it builds")
    assert not done.returncode, done.stderr
    import zipfile

    inside = set(zipfile.ZipFile(next((tmp_path / "out").glob("*.whl"))).namelist())
    due = {
        str(p.relative_to(ROOT))
        for p in (ROOT / "lth_companion").rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }
    assert due - inside == set() and any("tables/" in name for name in due)


def test_versions_agree():
    version = settings()["version"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()
    assert f'__version__ = "{version}"' in (ROOT / "lth_companion" / "__init__.py").read_text()
    assert "Apache License" in (ROOT / "LICENSE").read_text() and "END OF TERMS" in (ROOT / "LICENSE").read_text()


# ---------------------------------------------------------------- the library


@pytest.mark.parametrize("command", (["format", "--check"], ["check"]), ids=" ".join)
def test_the_house_has_one_form(command):
    "Ruff would change nothing, and has nothing to say (of the exported modules too)."
    done = subprocess.run([sys.executable, "-m", "ruff", *command], cwd=ROOT, capture_output=True, text=True)
    assert not done.returncode, f"run make format: {done.stdout[-3000:]}{done.stderr}"


def test_modules_are_what_the_notebooks_export(tmp_path):
    for part in ("nbs", "lth_companion", "settings.ini", "pyproject.toml"):
        if (ROOT / part).is_dir():
            shutil.copytree(
                ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
            )
        else:
            shutil.copy(ROOT / part, tmp_path / part)
    for module in (tmp_path / "lth_companion").rglob("*.py"):
        if module.name != "__init__.py":
            module.unlink()  # one that no notebook exports does not come back
    code = "from nbdev.doclinks import nbdev_export; nbdev_export()"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=120)
    here, there = (ROOT / "lth_companion", tmp_path / "lth_companion")
    names = {str(p.relative_to(folder)) for folder in (here, there) for p in folder.rglob("*.py")}
    _, different, missing = filecmp.cmpfiles(here, there, names, shallow=False)
    assert not different + missing, (
        f"run make export: {', '.join(sorted(different + missing))} is not what nbs/ exports"
    )
    assert filecmp.cmp(ROOT / "pyproject.toml", tmp_path / "pyproject.toml", shallow=False), (
        "run make export: pyproject.toml"
    )


FACE = """Ticket prunable keep_top erk uniform random magnitude snip grasp synflow SCORERS register scorer stack once saw prune
Recipe train evaluate imp sparse_train settings Supermask search overlap jaccard""".split()


def test_the_face_has_the_names_that_others_rely_on():
    import lth_companion

    assert lth_companion.__all__ == FACE and set(FACE) <= set(dir(lth_companion))
    for name in FACE:
        assert (
            getattr(lth_companion, name).__module__.startswith("lth_companion.")
            if name != "SCORERS"
            else "snip" in lth_companion.SCORERS
        )
    with pytest.raises(AttributeError, match="has no 'tickts'"):
        lth_companion.tickts


def test_the_face_is_light():
    "Nothing of torch is loaded before a name is used; in the best of three starts under a tenth of a second."
    code = (
        "import sys, time; t = time.perf_counter(); import lth_companion; print(time.perf_counter() - t); assert not"
        " {'torch', 'numpy', 'pydantic'} & set(sys.modules)"
    )
    took = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        for _ in range(3)
    ]
    assert min(took) < 0.1, took


def imported(path):
    "(module, names) of every import in the module at `path`; relative ones as lth_companion.*"
    here, tree = path.relative_to(ROOT).parts[:-1], ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = (
                ".".join(filter(None, [*here[: len(here) + 1 - node.level], node.module]))
                if node.level
                else node.module
            )
            yield base, [alias.name for alias in node.names]


@pytest.mark.parametrize("path", MODULES, **named)
def test_nothing_is_unpickled(path):
    tree = ast.parse(path.read_text())
    banned = {"cPickle", "_pickle", "dill", "cloudpickle", "shelve", "marshal"} | (
        {"pickle"} if path.stem != "formats" else set()
    )
    assert not {name.split(".")[0] for name, _ in imported(path)} & banned
    called = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, (ast.Attribute, ast.keyword))]
    for text in called:
        assert not re.fullmatch(r"(torch|pickle|joblib)\.(load|loads)", text) and text != "allow_pickle=True", text
    if path.stem == "formats":  # the one reader: a subclass of Unpickler that finds no name but its own
        uses = {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle"
        }
        assert uses == {"Unpickler", "UnpicklingError"}
        reader = next(
            n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and "pickle.Unpickler" in map(ast.unparse, n.bases)
        )
        assert "find_class" in {n.name for n in reader.body if isinstance(n, ast.FunctionDef)}


def exported_as(path):
    "The module that a chapter exports."
    found = [m[1] for cell in cells(path) if (m := re.match(r"#\|\s*default_exp\s+(\S+)", source(cell)))]
    assert len(found) == 1, f"{path.name} needs one default_exp"
    return found[0]


def test_chapters_and_modules_match():
    assert len(CHAPTERS) >= 10
    assert sorted(map(exported_as, CHAPTERS)) == sorted(
        ".".join(p.relative_to(ROOT / "lth_companion").with_suffix("").parts) for p in MODULES
    )
    numbers = [(p.parent, p.name[:2]) for p in CHAPTERS if "papers" not in p.parts]
    assert len(numbers) == len(set(numbers))
    for p in CHAPTERS:
        floor, _, name = exported_as(p).rpartition(".")
        assert p.parent.relative_to(ROOT / "nbs").parts[:1] == ((floor,) if floor else ()) and (
            floor == "papers" or p.stem[3:] == name
        ), f"{p} exports {exported_as(p)}"


def own(path):
    "The modules of ours that a module imports, by their dotted names below lth_companion."
    known, found = {exported_as(p) for p in CHAPTERS}, set()
    for name, names in imported(path):
        if name and (name + ".").startswith("lth_companion."):
            inside = name.removeprefix("lth_companion").lstrip(".")
            found |= {inside} & known | {".".join(filter(None, [inside, n])) for n in names} & known
    return found


@pytest.mark.parametrize("path", CHAPTERS, **named)
def test_a_module_imports_its_own_floor_and_those_below(path):
    "In the order of the floors, and on a floor in the order of its notebooks; a paper's module imports no other paper's."
    order, mine = [exported_as(p) for p in CHAPTERS], exported_as(path)
    late = {
        u for u in own(ROOT / "lth_companion" / f"{mine.replace('.', '/')}.py") if order.index(u) >= order.index(mine)
    }
    if mine.startswith("papers."):
        same = {exported_as(p) for p in CHAPTERS if p.parent == path.parent}
        late |= {u for u in own(ROOT / "lth_companion" / f"{mine.replace('.', '/')}.py") if u.startswith("papers.")}
        late -= same  # a paper's own modules have no order
    assert not late, f"{path.name} imports {late}, which come later"


# ---------------------------------------------------------------- notebooks


@pytest.mark.parametrize("path", CHAPTERS + PAPERS, **named)
def test_notebook_is_clean(path):
    "As nbdev_clean would leave it (outputs stay), with stable ids of its own."
    from execnb.nbio import dict2nb, nb2dict
    from nbdev.clean import clean_nb

    raw = json.loads(path.read_text())
    ids = [cell.get("id") for cell in raw["cells"]]
    assert all(ids) and len(ids) == len(set(ids)), "cells need ids that differ"
    nb = dict2nb(copy.deepcopy(raw))
    before = nb2dict(copy.deepcopy(nb))
    clean_nb(nb, allowed_cell_metadata_keys=["tags"])
    assert nb2dict(nb) == before, f"run nbdev_clean --fname {path.relative_to(ROOT)}"
    assert path.read_text().endswith("}\n")


def test_paper_notebooks_are_there():
    assert {p.parent.name for p in PAPERS} >= {"learning_to_learn"}


@pytest.mark.parametrize("path", PAPERS, **named)
def test_one_cell_of_annotated_parameters(path):
    tagged = [cell for cell in cells(path) if "parameters" in cell["metadata"].get("tags", [])]
    assert len(tagged) == 1 and tagged[0]["cell_type"] == "code"
    body = ast.parse(source(tagged[0])).body
    assert all(isinstance(node, ast.AnnAssign) and node.value is not None for node in body), (
        "every parameter needs its type and a default"
    )
    names = [node.target.id for node in body]
    assert {"tier", "device", "seeds", "workers", "out"} <= set(names)
    defaults = {node.target.id: ast.literal_eval(node.value) for node in body}
    assert defaults["tier"] == "smoke"  # opened in JupyterLab it runs at the smoke tier


@pytest.mark.parametrize("path", PAPERS, **named)
def test_paper_notebooks_export_nothing(path):
    assert not any(re.match(r"#\|\s*(default_exp|export)", source(cell)) for cell in cells(path))


@pytest.mark.parametrize("path", CHAPTERS + PAPERS, **named)
def test_notebook_begins_with_title_and_sentence(path):
    first = source(cells(path)[0]).strip().splitlines()
    assert (
        cells(path)[0]["cell_type"] == "markdown"
        and first[0].startswith("# ")
        and any(line.startswith("> ") for line in first[1:])
    )


# ---------------------------------------------------------------- figures


FIGURES = [p for p in (ROOT / "figures").rglob("*.*") if p.is_file() and "smoke" not in p.parts]  # smoke: not committed


def test_pictures_are_light():
    "No picture is a burden to a clone: a screen's resolution in PNG, text as text in SVG."
    bounds, sizes = {".png": 150_000, ".svg": 250_000}, {p: p.stat().st_size for p in FIGURES}
    heavy = {str(p): size for p, size in sizes.items() if size > bounds.get(p.suffix, math.inf)}
    assert sizes and not heavy, heavy
    assert sum(sizes.values()) < 18_000_000
