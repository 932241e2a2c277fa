"""Every command of the README runs, with few steps and small images, in the order of the README."""

import csv
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from jaxmed.data.sources.phantom_files import write_phantoms

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
STARTS = ("python ", "make ", "srun ", "gcloud ", ". ")


def commands():
    """The lines that a shell would run, continued ones joined, without comments."""
    for language, block in BLOCKS:
        if not language:
            for line in re.sub(r"\\\n\s*", "", block).splitlines():
                if line.startswith(STARTS):
                    yield re.sub(r"\s+# .*", "", line).strip()


COMMANDS = list(dict.fromkeys(commands()))
SMALL = {
    "classify": ["--config.model.width=4", "--config.model.stem_strides=2"],
    "segment": ["--config.model.features=(4,8,8)"],
}
FEW = {
    "training.steps": 4,
    "training.evaluate_every": 2,
    "data.batch_size": 4,
    "evaluation.resamples": 100,
    "evaluation.explain": False,
}
LAYOUTS = {"classify_folders": "class_folders", "segment_msd": "msd"}


def shortened(words):
    """What a command needs besides, to be over in seconds."""
    script = Path(words[0]).name
    config = next((w for w in words if w.startswith("--config=")), "")
    more = []
    if config and script != "plan.py":
        more += [f"--config.{key}={value}" for key, value in FEW.items()]
        more += SMALL[re.search(r"configs/([a-z]+)_", config)[1]]
    more += {
        "sweep.py": ["--trials=2"],
        "benchmark.py": ["--list"],
        "demo.py": ["--share=0.01"],
        "explain.py": ["--method=gradcam", "--cases=2"],
    }.get(script, [])
    if script == "train.py" and any("/shared/" in word for word in words):
        more.append("--dry_run")  # as on a machine of its own; two processes have their own tests
    return more


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder like a checkout, with images where the README says FOLDER."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("experiments", "configs"):
        (folder / name).symlink_to(ROOT / name)
    for layout in LAYOUTS.values():
        source = write_phantoms(folder / layout, layout=layout, size=32, count=24)
    folders = folder / "class_folders"
    images = sorted(folders.rglob("*.png"))
    with (folders / "manifest.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["file", "sex", "scanner"])
        for row, path in enumerate(images):
            writer.writerow([path.relative_to(folders), "FM"[row % 2], f"scanner {row % 3}"])
    assert len(images) == len(source) == 24
    (space,) = (block for language, block in BLOCKS if language == "yaml")
    (folder / "space.yaml").write_text(space)
    (folder / "image.png").write_bytes(images[0].read_bytes())
    (folder / "runs").mkdir()
    for name in "abc":
        (folder / "runs" / name).symlink_to("mine")
    return folder


def filled_in(line):
    """The words of a Python command, with this test's own images in place of the README's words."""
    words = shlex.split(re.search(r"python (.*)", line)[1].rstrip('"'))
    config = next((w for w in words if w.startswith("--config=")), "")
    layout = next((own for name, own in LAYOUTS.items() if name in config), "class_folders")
    known = {"THEIRS": "out/predictions.csv", "IMAGE_OR_FOLDER...": layout, "FOLDER": layout}
    # A run by hand is one of several processes, which wait for each other.
    words = [w for w in words if not w.startswith(("--coordinator", "--processes", "--process="))]
    return [re.sub("|".join(map(re.escape, known)), lambda m: known[m[0]], w) for w in words]


def run(words, place):
    done = subprocess.run(
        [sys.executable, *words],
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout[-2000:]}{done.stderr[-3000:]}"
    return done.stdout


def test_the_readme_names_every_script_and_notebook():
    told = " ".join(COMMANDS)
    for script in sorted((ROOT / "experiments").glob("*.py")):
        assert script.name == "demo.py" or f"experiments/{script.name}" in told
    assert "make demo" in README
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        assert f"(notebooks/{notebook.name})" in README


def test_links_lead_somewhere():
    titles = re.findall(r"^#+ (.*)", README, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if target.startswith("#"):
            assert target[1:] in anchors
        elif not target.startswith("https://"):
            assert (ROOT / target).exists(), target


@pytest.mark.parametrize("target", sorted(set(re.findall(r"(?m)(?:^|`)make ([a-z]+)", README))))
def test_make_knows_its_targets(target):
    command = ["make", "-n", target]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("line", [line for line in COMMANDS if "python " in line])
def test_command(line, place):
    words = filled_in(line)
    run([*words, *shortened(words)], place)


@pytest.mark.slow
def test_the_demo(place):
    assert "auroc" in run(["experiments/demo.py", *shortened(["demo.py"])], place)


@pytest.mark.slow
@pytest.mark.parametrize(
    "code", [block for _, block in BLOCKS if re.match("from|import", block)], ids=["export", "run"]
)
def test_code(code, place):
    """After the commands, which train and export what it opens."""
    before = "import sys, numpy as np; sys.path.insert(0, 'exported/model.zip');"
    array = "array = np.zeros((32, 32, 1), np.uint8)\n"
    three, two = "(1.0, 1.0, 2.5)", "(1.0, 1.0)"  # the images of this test are flat
    run(["-c", before + array + code.replace(three, two)], place)
