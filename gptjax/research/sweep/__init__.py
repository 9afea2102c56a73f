"""Many runs in one compiled program. A sweep is a list of configs, each of which is a run by itself:

configs = sweep.grid("tiny-gpt2", "optim.lr=[1e-3,3e-3,1e-2]", "seed=range(8)")     24 runs
found   = sweep.sweep(configs)                          trained side by side, each as if it were alone
found.rows                                              a dict a run: what differs, losses
sweep.table(found.rows, found.axes)                     a dict a combination: mean and interval over seeds
found.state(5).params                                   of one run

Numbers (`TRACED`: rates, decay, warmup, clip, dropout, an adapter's scale and rank, the seed) are arrays with an entry
a run, and the step of `make_train_step` is vmapped over them. Whatever else differs changes the program: runs are
grouped, one program a group. What fits into memory goes at a time.
"""

from gptjax.research.sweep.results import WRITING, draw, lines, write
from gptjax.research.sweep.runs import (
    MOST_COMPLAINTS,
    MOST_RUNS,
    TRACED,
    TRACED_OF_ADAPTERS,
    Numbers,
    axes_of,
    combinations,
    grid,
    programs,
    split_axes,
    traceable,
    with_numbers,
)
from gptjax.research.sweep.train import (
    LAST_PART,
    MOST_STEPS_PER_CALL,
    WHOLE,
    Sweep,
    bytes_a_run,
    chunks,
    create,
    free_bytes,
    make_sweep_loss,
    make_sweep_step,
    sweep,
    table,
)

__all__ = [
    "LAST_PART",
    "MOST_COMPLAINTS",
    "MOST_RUNS",
    "MOST_STEPS_PER_CALL",
    "TRACED",
    "TRACED_OF_ADAPTERS",
    "WHOLE",
    "WRITING",
    "Numbers",
    "Sweep",
    "axes_of",
    "bytes_a_run",
    "chunks",
    "combinations",
    "create",
    "draw",
    "free_bytes",
    "grid",
    "lines",
    "make_sweep_loss",
    "make_sweep_step",
    "programs",
    "split_axes",
    "sweep",
    "table",
    "traceable",
    "with_numbers",
    "write",
]  # fmt: skip
