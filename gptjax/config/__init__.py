"""The configuration: one schema, filled in layers, checked as a whole. Nothing here imports jax.

schema    the settings: dataclasses, each field with its help and range
leaves    YAML, `a.b=c` and dicts -> (key, value, where) one by one
load      leaves -> Config, and back to YAML; presets
check     what must hold
aliases   other tools' names, the nearest spelling
uses      which verb and task reads which setting

`gptjax.config.schema` read as an attribute is the function; `from gptjax.config.schema import ..` is the module.
"""

from gptjax.config.check import WITHOUT_EFFECT, validate
from gptjax.config.leaves import Provenance
from gptjax.config.load import (
    RULED,
    build,
    config_file,
    diff,
    file_layers,
    from_dict,
    from_yaml,
    layer,
    load_config,
    presets,
    resolve,
    short,
    to_yaml,
    yaml_value,
)
from gptjax.config.schema import (
    ARCHS,
    Architecture,
    ClassifyConfig,
    Computation,
    Config,
    DataConfig,
    DistributedConfig,
    FinetuneConfig,
    InstructConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    PreferConfig,
    PretrainConfig,
    SampleConfig,
    TokenizerConfig,
    TrainConfig,
    describe,
    flat,
    schema,
    type_name,
)

__all__ = [
    "ARCHS", "RULED", "WITHOUT_EFFECT", "Architecture", "ClassifyConfig", "Computation", "Config", "DataConfig",
    "DistributedConfig", "FinetuneConfig", "InstructConfig", "LoraConfig", "MeshConfig", "ModelConfig",
    "OptimConfig", "PreferConfig", "PretrainConfig", "Provenance", "SampleConfig", "TokenizerConfig", "TrainConfig",
    "build", "config_file", "describe", "diff", "file_layers", "flat", "from_dict", "from_yaml", "layer",
    "load_config", "presets", "resolve", "schema", "short", "to_yaml", "type_name", "validate", "yaml_value",
]  # fmt: skip
