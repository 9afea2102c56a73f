"""What `test_sweep.py` runs on two devices: a sweep of the configs in its argument."""

import json
import sys

import jax

import gptjax
from gptjax.research import sweep


def main() -> None:
    found = sweep.sweep([gptjax.load_config("tiny-gpt2", *own) for own in json.loads(sys.argv[1])], at_once=2)
    print(json.dumps({"devices": jax.device_count(), "losses": [own.tolist() for own in found.losses]}))


if __name__ == "__main__":
    main()
