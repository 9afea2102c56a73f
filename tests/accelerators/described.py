"""An abstract H100 that XLA can compile for without a GPU, if jax's CUDA plugin is installed."""

import functools
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# copied from XLA's description of an H100 (xla/backends/gpu/target_config)
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84978434048 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 patch: 0 } runtime_version { major: 12 minor: 9 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@functools.cache
def card() -> NamedSharding:
    """A sharding that places arrays on the abstract H100."""
    topology = topologies.get_topology_desc("h100", platform="cuda", topology="1x1x1", target_config=H100)
    return NamedSharding(Mesh(np.array(topology.devices), ("gpu",)), PartitionSpec())


def placed(tree: Any) -> Any:
    """The shapes of a tree, with a sharding that places them on the abstract H100."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=card()), tree)
