# What `build.py` puts after the title of every notebook. Installing changes nothing that the runtime came with, so
# neither a restart nor another jax than the one that fits the TPU's driver is possible: pip refuses instead.

# %% cellView="form"
# @title Install gptjax, where it is not yet
import importlib.metadata
import importlib.util
from pathlib import Path

SOURCE = "git+https://github.com/gptjax/gptjax"  # @param {type:"string"}
if importlib.util.find_spec("gptjax") is None:
    as_it_is = ("jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda12-pjrt", "flax", "optax", "orbax-checkpoint")
    here = {part.name: part.version for part in importlib.metadata.distributions()}
    lines = [f"{name}=={here[name]}\n" for name in (*as_it_is, "numpy", "matplotlib") if name in here]
    Path("as-it-is.txt").write_text("".join(lines))
    # %pip install --quiet --constraint as-it-is.txt {SOURCE}

# %% cellView="form"
# @title Keep what this notebook writes on Google Drive?
import os

MOUNT_DRIVE = False  # @param {type:"boolean"}
if MOUNT_DRIVE:
    from google.colab import drive

    drive.mount("/content/drive")
    os.makedirs("/content/drive/MyDrive/gptjax", exist_ok=True)
    os.chdir("/content/drive/MyDrive/gptjax")  # relative paths below lead there
