"""Run by `test_sweep.py` on two devices: a sweep of the configs in its argument."""

import json
import sys

import jax

import gptjax
from gptjax.research import sweep


def main() -> None:
    result = sweep.sweep(
        [gptjax.load_config("tiny-gpt2", *settings) for settings in json.loads(sys.argv[1])], at_once=2
    )
    print(json.dumps({"devices": jax.device_count(), "losses": [losses.tolist() for losses in result.losses]}))


if __name__ == "__main__":
    main()
