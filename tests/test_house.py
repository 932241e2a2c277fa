"""The rules that hold the house together, read off the source."""

import ast
import json
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path for room in ("jaxmed", "configs", "experiments") for path in (ROOT / room).rglob("*.py")
)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# Each can run code that a file brings along, or that a name spells.
FORBIDDEN_IMPORTS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
FORBIDDEN_CALLS = {
    "eval",
    "exec",
    "__import__",
    "os.system",
    "os.popen",
    "yaml.load",
    "yaml.unsafe_load",
}
NUMPY_LOADS = {"np.load", "numpy.load"}
VAGUE_NAMES = {"utils", "util", "helpers", "misc"}


def findings(code: str) -> list[str]:
    """Line and name of whatever the rules forbid in one file."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            names.append(getattr(node, "module", None) or "")
            bad = sorted({name.split(".")[0] for name in names} & FORBIDDEN_IMPORTS)
            found += [f"{node.lineno}: import of {name}" for name in bad]
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if name in FORBIDDEN_CALLS:
                found.append(f"{node.lineno}: call of {name}")
            if options.get("shell", "False") != "False":
                found.append(f"{node.lineno}: {name} through a shell")
            if options.get("allow_pickle", "False") != "False":
                found.append(f"{node.lineno}: {name} with allow_pickle")
            if name in NUMPY_LOADS and "allow_pickle" not in options:
                found.append(f"{node.lineno}: {name} without allow_pickle=False")
    return found


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from cloudpickle import dumps",
        "eval('1')",
        "import os\nos.system('ls')",
        "run('ls', shell=True)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
    ],
)
def test_forbidden_code_is_found(code):
    assert findings(code)


def test_nothing_executes_what_a_file_brings():
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in SOURCES
        for line in findings(path.read_text())
    ]
    assert not found


def test_modules_have_telling_names():
    vague = [
        path for path in SOURCES if path.stem in VAGUE_NAMES or re.search(r"[23]d$", path.stem)
    ]
    assert not vague


def test_rooms_import_only_downwards():
    command = [Path(sys.executable).parent / "lint-imports", "--no-cache", "--no-logo"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_import_is_light():
    code = "import sys, jaxmed; print(*sys.modules)"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in result.stdout.split()}
    assert "jaxmed" in loaded
    assert not loaded & {
        "jax",
        "flax",
        "grain",
        "matplotlib",
        "numpy",
        "orbax",
        "tensorflow_datasets",
    }


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_pins_are_plain_and_within_the_ranges(version):
    lines = (ROOT / "constraints" / f"python{version}.txt").read_text().splitlines()
    assert [line for line in lines if not re.fullmatch(r"[a-z0-9-]+==[0-9][\w.+!]*", line)] == []
    pins = dict(line.split("==") for line in lines)
    assert len(pins) == len(lines)
    extras = PROJECT["optional-dependencies"].values()
    for text in [*PROJECT["dependencies"], *(text for extra in extras for text in extra)]:
        requirement = Requirement(text)
        pin = pins[re.sub("[-_.]+", "-", requirement.name).lower()]
        assert pin in requirement.specifier, f"{text} but {pin} is pinned"


def test_version_is_said_once():
    code = (ROOT / "jaxmed" / "__init__.py").read_text()
    assert f'__version__ = "{PROJECT["version"]}"' in code
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(
        rf"^## \[({re.escape(PROJECT['version'])}|Unreleased)\]", changelog, re.MULTILINE
    )


API = runpy.run_path(str(ROOT / ".ci" / "api.py"))


def test_the_list_of_public_names_is_true():
    assert (ROOT / "API.md").read_text() == API["listing"](), "run: python .ci/api.py"


def test_constants_types_and_defaults_are_public_too():
    listed = API["listing"]()
    assert "- `TASKS = ('classification', 'detection', 'segmentation')`" in listed
    assert "- `Transform = Callable[[Example], Example]`: Deterministic" in listed
    assert "- of other modules: `MAX_VOXELS`, `Image`" in listed
    assert "`nms(boxes, scores, labels=None, *, iou_threshold=0.5, max_boxes=100)`" in listed


def test_public_functions_are_annotated_and_documented():
    bare, count = [], 0
    for module, _, definitions in API["public_modules"]():
        members = [(module, node) for node in definitions]
        for node in definitions:
            if isinstance(node, ast.ClassDef):
                members += [
                    (f"{module}.{node.name}", member)
                    for member in node.body
                    if isinstance(member, ast.FunctionDef) and not member.name.startswith("_")
                ]
        for where, node in members:
            if isinstance(node, ast.ClassDef):
                continue
            count += 1
            of = node.args
            arguments = [*of.posonlyargs, *of.args, *of.kwonlyargs, of.vararg, of.kwarg]
            unknown = [a for a in arguments if a and not a.annotation and a.arg not in "self cls"]
            if unknown or node.returns is None or not ast.get_docstring(node):
                bare.append(f"{where}.{node.name}")
    assert count > 300
    assert not bare


def test_notebooks_hold_no_outputs():
    notebooks = sorted((ROOT / "notebooks").glob("*.ipynb"))
    assert notebooks
    for path in notebooks:
        notebook = json.loads(path.read_text())
        assert set(notebook["metadata"]) <= {"kernelspec", "language_info"}, path.name
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code":
                kept = cell["outputs"], cell["execution_count"]
                assert kept == ([], None), f"{path.name}: clear all outputs"
