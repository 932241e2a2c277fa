"""Pins the newest versions that pyproject.toml allows, for the Python that runs this."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

EXTRAS = "test,notebooks,dicom-seg,export,sweeps,cuda,tpu,torch"

with tempfile.NamedTemporaryFile(suffix=".json") as report:
    command = [sys.executable, "-m", "pip", "install", "-q", "--dry-run", "--ignore-installed"]
    command += ["--report", report.name, f".[{EXTRAS}]", "pip", "setuptools<90"]
    subprocess.run(command, check=True)
    packages = [entry["metadata"] for entry in json.load(report)["install"]]

# Without what tells one build of a version from another, such as "+cpu".
pins = {p["name"].lower().replace("_", "-"): p["version"].split("+")[0] for p in packages}
del pins["jaxmed"]
path = Path("constraints") / f"python{sys.version_info.major}.{sys.version_info.minor}.txt"
path.write_text("".join(f"{name}=={version}\n" for name, version in sorted(pins.items())))
print(f"{path}: {len(pins)} packages")
