"""The 18 sets of MedMNIST v2: facts from the authors' table of release 3.0.2.

Yang et al., "MedMNIST v2: a large-scale lightweight benchmark for 2D and 3D biomedical image
classification", Scientific Data 10, 41 (2023).
"""

from __future__ import annotations

import dataclasses

CITATION = "Yang et al., Scientific Data 10, 41 (2023)"
URL = "https://zenodo.org/records/10519652/files/{name}.npz?download=1"


@dataclasses.dataclass(frozen=True)
class MedMNISTSet:
    """One set of MedMNIST v2, images of 28 pixels a side.

    Attributes:
        kind: where the images come from.
        channels: 1, or 3 for colour.
        class_names: in the order of their numbers.
        md5: checksum of the npz file.
        ndim: 2 or 3.
        multilabel: whether several classes may hold at once.
        licence: of the images.
    """

    kind: str
    channels: int
    class_names: tuple[str, ...]
    md5: str
    ndim: int = 2
    multilabel: bool = False
    licence: str = "CC BY 4.0"


_ORGANS = (
    "bladder",
    "femur-left",
    "femur-right",
    "heart",
    "kidney-left",
    "kidney-right",
    "liver",
    "lung-left",
    "lung-right",
    "pancreas",
    "spleen",
)

MEDMNIST_SETS = {
    "pathmnist": MedMNISTSet(
        "histology",
        3,
        (
            "adipose",
            "background",
            "debris",
            "lymphocytes",
            "mucus",
            "smooth muscle",
            "normal colon mucosa",
            "cancer-associated stroma",
            "colorectal adenocarcinoma epithelium",
        ),
        "a8b06965200029087d5bd730944a56c1",
    ),
    "chestmnist": MedMNISTSet(
        "X-ray",
        1,
        (
            "atelectasis",
            "cardiomegaly",
            "effusion",
            "infiltration",
            "mass",
            "nodule",
            "pneumonia",
            "pneumothorax",
            "consolidation",
            "edema",
            "emphysema",
            "fibrosis",
            "pleural",
            "hernia",
        ),
        "02c8a6516a18b556561a56cbdd36c4a8",
        multilabel=True,
    ),
    "dermamnist": MedMNISTSet(
        "dermatoscopy",
        3,
        (
            "actinic keratoses and intraepithelial carcinoma",
            "basal cell carcinoma",
            "benign keratosis-like lesions",
            "dermatofibroma",
            "melanoma",
            "melanocytic nevi",
            "vascular lesions",
        ),
        "0744692d530f8e62ec473284d019b0c7",
        licence="CC BY-NC 4.0",
    ),
    "octmnist": MedMNISTSet(
        "OCT",
        1,
        ("choroidal neovascularization", "diabetic macular edema", "drusen", "normal"),
        "c68d92d5b585d8d81f7112f81e2d0842",
    ),
    "pneumoniamnist": MedMNISTSet(
        "X-ray", 1, ("normal", "pneumonia"), "28209eda62fecd6e6a2d98b1501bb15f"
    ),
    "retinamnist": MedMNISTSet(
        "fundus", 3, ("0", "1", "2", "3", "4"), "bd4c0672f1bba3e3a89f0e4e876791e4"
    ),
    "breastmnist": MedMNISTSet(
        "ultrasound", 1, ("malignant", "normal, benign"), "750601b1f35ba3300ea97c75c52ff8f6"
    ),
    "bloodmnist": MedMNISTSet(
        "microscopy",
        3,
        (
            "basophil",
            "eosinophil",
            "erythroblast",
            "immature granulocytes (myelocytes, metamyelocytes and promyelocytes)",
            "lymphocyte",
            "monocyte",
            "neutrophil",
            "platelet",
        ),
        "7053d0359d879ad8a5505303e11de1dc",
    ),
    "tissuemnist": MedMNISTSet(
        "microscopy",
        1,
        (
            "Collecting Duct, Connecting Tubule",
            "Distal Convoluted Tubule",
            "Glomerular endothelial cells",
            "Interstitial endothelial cells",
            "Leukocytes",
            "Podocytes",
            "Proximal Tubule Segments",
            "Thick Ascending Limb",
        ),
        "ebe78ee8b05294063de985d821c1c34b",
    ),
    "organamnist": MedMNISTSet("CT", 1, _ORGANS, "68e3f8846a6bd62f0c9bf841c0d9eacc"),
    "organcmnist": MedMNISTSet("CT", 1, _ORGANS, "b9ceb9546e10131b32923c5bbeaea2b1"),
    "organsmnist": MedMNISTSet("CT", 1, _ORGANS, "9ab87b696fb54e2a387ebe992d6ed5f1"),
    "organmnist3d": MedMNISTSet(
        "CT",
        1,
        (
            "liver",
            "kidney-right",
            "kidney-left",
            "femur-right",
            "femur-left",
            "bladder",
            "heart",
            "lung-right",
            "lung-left",
            "spleen",
            "pancreas",
        ),
        "a0c5a1ff56af4f155c46d46fbb45a2fe",
        ndim=3,
    ),
    "nodulemnist3d": MedMNISTSet(
        "CT", 1, ("benign", "malignant"), "8755a7e9e05a4d9ce80a24c3e7a256f3", ndim=3
    ),
    "adrenalmnist3d": MedMNISTSet(
        "CT", 1, ("normal", "hyperplasia"), "bbd3c5a5576322bc4cdfea780653b1ce", ndim=3
    ),
    "fracturemnist3d": MedMNISTSet(
        "CT",
        1,
        ("buckle rib fracture", "nondisplaced rib fracture", "displaced rib fracture"),
        "6aa7b0143a6b42da40027a9dda61302f",
        ndim=3,
    ),
    "vesselmnist3d": MedMNISTSet(
        "MRA", 1, ("vessel", "aneurysm"), "b41fd4f7e7e2feedddb201585ecafa1b", ndim=3
    ),
    "synapsemnist3d": MedMNISTSet(
        "electron microscopy",
        1,
        ("inhibitory synapse", "excitatory synapse"),
        "1235b78a3cd6280881dd7850a78eadb6",
        ndim=3,
    ),
}
