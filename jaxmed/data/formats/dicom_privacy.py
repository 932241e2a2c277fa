"""What a DICOM file tells of a person: which tags, never their values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pydicom

from jaxmed.data.formats import common

NEVER_NEEDED = (
    "PatientBirthName",
    "PatientMotherBirthName",
    "PatientAddress",
    "PatientTelephoneNumbers",
    "MedicalRecordLocator",
)
"""Tags for which de-identified files have no pseudonym."""
IDENTIFYING = (
    "PatientName",
    "PatientID",
    "OtherPatientIDs",
    "OtherPatientNames",
    "PatientBirthDate",
    "AccessionNumber",
    "ReferringPhysicianName",
    "PerformingPhysicianName",
    "NameOfPhysiciansReadingStudy",
    "RequestingPhysician",
    "OperatorsName",
    "InstitutionName",
    "InstitutionAddress",
    *NEVER_NEEDED,
)
"""Tags that name a person or where to find one (the direct ones of DICOM PS3.15 table E.1-1)."""


def privacy(files: Sequence[Path]) -> tuple[Counter[str], bool]:
    """In how many files each identifying tag is filled, and whether one has burnt-in text.

    Of a file that says it is de-identified only tags count that no pseudonym stands in for.
    """
    tags: Counter[str] = Counter()
    burnt = False
    wanted = [*IDENTIFYING, "PatientIdentityRemoved", "BurnedInAnnotation"]
    for file in files:
        with common.reading(file, private=True):
            header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=wanted)
            removed = str(header.get("PatientIdentityRemoved", "")).strip().upper() == "YES"
            for tag in NEVER_NEEDED if removed else IDENTIFYING:
                tags[tag] += bool(str(header.get(tag, "") or "").strip())
            burnt |= str(header.get("BurnedInAnnotation", "")).strip().upper() == "YES"
    return +tags, burnt
