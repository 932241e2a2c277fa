"""Where examples come from: one file, and one class, for each way in which data sets lie on disk.

    phantoms        made up on the spot, nothing to download
    class_folders   CLASS/... or SPLIT/CLASS/..., one folder a class
    medmnist        the npz files of MedMNIST v2, or one's own with the same keys
    voc             Pascal VOC: an XML file of boxes beside each image
    coco            COCO: one JSON file of boxes for many images
    pairs           images and masks of the same name
    msd             Medical Segmentation Decathlon, and nnU-Net's raw folders
    tfds            TensorFlow Datasets, without TensorFlow

Each class takes the path first and plain keyword arguments, fulfils `jaxmed.types.Source`, checks
when made all that can be checked without decoding images, and checks each image when it is read.
What the layouts have in common is in `base`; `findings` collects what is wrong; `masks` turns a
file into class or instance numbers, `objects` annotations into boxes; `layouts` knows a folder by
its looks.
"""
