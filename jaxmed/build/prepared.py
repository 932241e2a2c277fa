"""Prepared cases on disk: where they lie, and whether they are those of this data and plan."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from ml_collections import ConfigDict

import jaxmed
from jaxmed.build import datasets
from jaxmed.build.checks import check_numbers
from jaxmed.build.members import rows_of
from jaxmed.build.preparation import Prepare, PrepareForTraining, make_prepare
from jaxmed.build.resolve import resolve
from jaxmed.build.workdir import make_folder
from jaxmed.data.shards import VERSION, Shards, is_finished, write_shards
from jaxmed.data.tfds_writing import write_tfds
from jaxmed.preprocessing.fingerprint import digest
from jaxmed.training.processes import is_first, wait_for_all
from jaxmed.types import Source, UserError, count_of

READERS = (
    "numpy",
    "scipy",
    "nibabel",
    "SimpleITK",
    "pydicom",
    "tifffile",
    "imagecodecs",
    "imageio",
    "pillow",
)
"""Packages that read and prepare images."""


def check_place(config: ConfigDict) -> None:
    """Refuse a `data.prepared` within the data, where it would be taken for a part of them.

    Raises:
        UserError: saying so.
    """
    data = config.data
    if not data.prepared or not data.path:
        return
    if Path(data.prepared).resolve().is_relative_to(Path(data.path).resolve()):
        raise UserError(
            f"data.prepared={data.prepared}: lies in data.path; choose a folder elsewhere"
        )


def prepared_cases(
    root: str | Path, source: Source, prepare: Prepare, split: Mapping[str, Sequence[int]]
) -> Shards:
    """The prepared training cases, written first where they are not there yet.

    Args:
        root: folder of any number of prepared sets.
        source: the data set.
        prepare: what prepares a case.
        split: rows of each part.
    """
    rows = rows_of(split, "train")
    key = set_key(source, prepare, rows)
    folder = Path(root) / f"{source.info.name}-{key[:16]}"
    if is_first() and not is_finished(folder, key=key):
        make_folder(folder)
        start = time.monotonic()
        ready = PrepareForTraining(prepare)
        written = write_shards(
            lambda row: ready(source[row]),
            rows,
            source.ids,
            folder,
            key=key,
            progress=show_progress("prepared", len(rows)),
        )
        size = sum(path.stat().st_size for path in folder.iterdir()) / 2**30
        seconds = time.monotonic() - start
        print(
            f"{folder}: prepared {count_of(written, 'case')} in {seconds:.0f} s; {size:.2g} GiB "
            f"of {count_of(len(rows), 'case')}"
        )
    wait_for_all("prepared cases: written")
    return Shards(folder, key=key, info=source.info)


def set_key(source: Source, prepare: Prepare, rows: Sequence[int]) -> str:
    """A SHA-256 of all that decides what is in a prepared set."""
    # Files tell of a change by their times; of what lies elsewhere all is read.
    stamp = getattr(source, "stamp", lambda: digest(source, limit=len(source)))
    names = [source.ids[row] for row in rows]
    told = (VERSION, prepare, digest(source), stamp(), names, *map(version, READERS))
    content = hashlib.sha256(repr(told).encode())
    # And the code that reads and prepares: mended, it must not meet what it once made.
    readers = ("data/images.py", "data/formats", "data/sources")
    code = digest_of_code(*readers, "preprocessing", "build/preparation.py")
    content.update(code.encode())
    return content.hexdigest()


def digest_of_code(*names: str) -> str:
    """A SHA-256 of modules and folders of this package, named from its own folder."""
    home, content = Path(jaxmed.__file__).parent, hashlib.sha256()
    for place in (home / name for name in names):
        for file in [place] if place.is_file() else sorted(place.glob("*.py")):
            content.update(file.read_bytes())
    return content.hexdigest()


def prepare_run(config: ConfigDict, output: str | Path, *, as_tfds: bool = False) -> None:
    """Prepare the cases of a config as training would, with `data.prepared` set to this folder.

    Args:
        config: as for training; left open, it is planned the same way.
        output: folder of prepared sets.
        as_tfds: write the cases of all parts as a data set of TensorFlow Datasets instead, for
            other programs; its images are as the network gets them, but for a scaling by the
            statistics of the set, which training does on the device.
    """
    from jaxmed.build.runs import cut_split

    check_numbers(config)
    config = config.copy_and_resolve_references()
    config.data.prepared = str(output)
    check_place(config)
    # Training alone asks for these, and a step would be compiled to plan them.
    config.data.batch_size, config.training.steps = 1, 1
    source = datasets.make_source(config)
    split, _ = cut_split(config, source)
    config, _, _ = resolve(config, source, rows_of(split, "train"))
    if as_tfds:
        prepare, count = make_prepare(config), sum(map(len, split.values()))
        home = write_tfds(
            lambda row: prepare(source[row]),
            split,
            source.ids,
            source.info,
            output,
            progress=show_progress("written", count),
        )
        print(f"{count_of(count, 'case')} written: tfds.builder_from_directory({str(home)!r})")
        return
    shards = prepared_cases(output, source, make_prepare(config), split)
    print(f"{count_of(len(shards), 'case')} ready: train.py --config.data.prepared={output}")


def show_progress(verb: str, total: int) -> Callable[[int], None]:
    """A line that counts up on a terminal; nothing in a log."""
    if not sys.stdout.isatty():
        return lambda done: None

    def show(done: int) -> None:
        end = "\n" if done == total else ""
        print(f"\r{verb} {done} of {total}", end=end, flush=True)

    return show
