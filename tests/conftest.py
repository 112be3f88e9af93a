"""What must hold before any test imports a library."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"

import solution.images  # noqa: F401 - OpenCV reads its log level when it is first imported, and this room sets it
