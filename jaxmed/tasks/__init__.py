"""The one place where classification, detection and segmentation differ."""
