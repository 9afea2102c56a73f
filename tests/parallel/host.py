"""Run by `test_hosts.py` in each of several processes: trains a config and records which windows the process read."""

import json
import sys

import numpy as np

import gptjax
from gptjax.data import loader


def main() -> None:
    out, *settings = sys.argv[1:]
    read, gather = [], loader.gather

    def noted(store, starts, *args):
        read.append(np.asarray(starts).tolist())
        return gather(store, starts, *args)

    loader.gather = noted
    result = gptjax.train(gptjax.load_config("tiny-gpt2", *settings))
    with open(out, "w") as file:
        json.dump({"read": read, "val_loss": result.val_loss, "step": result.step}, file)


if __name__ == "__main__":
    main()
