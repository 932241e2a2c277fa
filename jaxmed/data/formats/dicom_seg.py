"""Write DICOM segmentation objects through highdicom, an extra of the package: dicom-seg."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom

import jaxmed
from jaxmed.data.formats import common
from jaxmed.types import UserError

_MAY_BE_EMPTY = (
    "PatientID",
    "PatientName",
    "PatientBirthDate",
    "PatientSex",
    "StudyID",
    "StudyDate",
    "StudyTime",
    "AccessionNumber",
    "ReferringPhysicianName",
)


def check_available(path: Path) -> None:
    """Raise a UserError, naming the image, where highdicom is not installed."""
    if importlib.util.find_spec("highdicom") is None:
        raise UserError(
            f"{path}: its mask would be a DICOM SEG, which needs highdicom: make setup "
            "EXTRAS=dicom-seg, or convert the image to NIfTI"
        )


def _descriptions(highdicom: Any, count: int, names: Sequence[str]) -> list[Any]:
    """One description a class number, 1 to `count`, with its name where there is one."""
    from pydicom.sr.codedict import codes

    algorithm = highdicom.AlgorithmIdentificationSequence(
        name="jaxmed",
        version=jaxmed.__version__,
        family=codes.DCM.ArtificialIntelligence,
    )
    return [
        highdicom.seg.SegmentDescription(
            segment_number=number,
            # A label may have 64 characters.
            segment_label=(names[number] if number < len(names) else f"class {number}")[:64],
            segmented_property_category=codes.SCT.Tissue,
            segmented_property_type=codes.SCT.Tissue,
            algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=algorithm,
        )
        for number in range(1, count + 1)
    ]


def write(
    path: Path,
    planes: np.ndarray,
    files: Sequence[Path],
    names: Sequence[str],
    *,
    thickness: float,
) -> None:
    """Write a binary DICOM SEG.

    Args:
        path: of the new file.
        planes: (slices, rows, cols) class numbers, slice by slice as in `files`.
        files: the DICOM files that were segmented; the new file names their patient, as they do.
        names: of the class numbers from 0; a number beyond them is called by itself.
        thickness: of a slice in mm, for files that do not say it.

    Raises:
        UserError: highdicom is not installed, or the images lack what a SEG must refer to.
    """
    check_available(path)
    import highdicom

    with common.reading(files[0], private=True, verb="used for a DICOM SEG"):
        sources = [pydicom.dcmread(file, stop_before_pixels=True) for file in files]
        for source in sources:
            for name in _MAY_BE_EMPTY:
                if name not in source:  # anonymised files often lack them
                    setattr(source, name, "")
            if not source.get("SliceThickness"):
                source.SliceThickness = thickness
        values = common.smallest_unsigned(planes, 2**16 - 1)
        segmentation = highdicom.seg.Segmentation(
            source_images=sources,
            pixel_array=values,
            segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
            segment_descriptions=_descriptions(
                highdicom, max(1, int(values.max(initial=0))), names
            ),
            series_instance_uid=highdicom.UID(),
            series_number=900,
            sop_instance_uid=highdicom.UID(),
            instance_number=1,
            manufacturer="jaxmed",
            manufacturer_model_name="jaxmed",
            software_versions=jaxmed.__version__,
            device_serial_number="0",
            series_description="segmentation",
        )
        segmentation.save_as(path)
