"""What must hold before any test imports a library."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
os.environ["OPENCV_FFMPEG_LOGLEVEL"] = "-8"  # OpenCV reads it once, at the first video

import threading

from tqdm import tqdm

# A test that kills a forked process must not leave it holding the lock that all processes' bars share.
tqdm.set_lock(threading.RLock())
