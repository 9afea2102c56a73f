"""The configuration of a run. All settings are defined in one schema. The values of the settings are read from several
layers, such as a preset and the command line, and are then validated together. No module of the package `gptjax.config`
imports jax.

schema: defines the settings as fields of dataclasses, each with a help text and a valid range
leaves: reads YAML, arguments such as `a.b=c`, and dicts into leaves (key, value, and the place where the value was set)
load: finds presets, builds a `Config` from leaves, and converts a `Config` to YAML
check: checks the ranges of settings, and the rules about combinations of settings
aliases: writes error texts for unknown keys, which suggest the key of the corresponding setting of gptjax
uses: lists the settings that each command and task reads

The attribute `gptjax.config.schema` is the function `schema`, not the module of the same name. To import from the
module `schema`, write `from gptjax.config.schema import ..`.
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
    DistillConfig,
    DistributedConfig,
    FinetuneConfig,
    InstructConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    PreferConfig,
    PretrainConfig,
    RewardConfig,
    RewardModelConfig,
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
    "DistillConfig", "DistributedConfig", "FinetuneConfig", "InstructConfig", "LoraConfig", "MeshConfig", "ModelConfig",
    "OptimConfig", "PreferConfig", "PretrainConfig", "Provenance", "RewardConfig", "RewardModelConfig", "SampleConfig",
    "TokenizerConfig", "TrainConfig", "build", "config_file", "describe", "diff", "file_layers", "flat", "from_dict",
    "from_yaml", "layer", "load_config", "presets", "resolve", "schema", "short", "to_yaml", "type_name", "validate",
    "yaml_value",
]  # fmt: skip
