# `build.py` inserts these cells after the title of every notebook. The constraint file pins the packages that the
# runtime came with, so pip fails rather than replacing jax by a version that does not fit the TPU driver. No restart is
# needed after the installation.

# %% cellView="form"
# @title Install gptjax if it is missing
import importlib.metadata
import importlib.util
from pathlib import Path

SOURCE = "git+https://github.com/gptjax/gptjax"  # @param {type:"string"}
if importlib.util.find_spec("gptjax") is None:
    pinned = ("jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda12-pjrt", "flax", "optax", "orbax-checkpoint")
    installed = {package.name: package.version for package in importlib.metadata.distributions()}
    lines = [f"{name}=={installed[name]}\n" for name in (*pinned, "numpy", "matplotlib") if name in installed]
    Path("as-it-is.txt").write_text("".join(lines))
    # %pip install --quiet --constraint as-it-is.txt {SOURCE}

# %% cellView="form"
# @title Save files to Google Drive? (Colab only)
import os

MOUNT_DRIVE = False  # @param {type:"boolean"}
if MOUNT_DRIVE:
    from google.colab import drive

    drive.mount("/content/drive")
    os.makedirs("/content/drive/MyDrive/gptjax", exist_ok=True)
    os.chdir("/content/drive/MyDrive/gptjax")  # relative paths below refer to this folder
