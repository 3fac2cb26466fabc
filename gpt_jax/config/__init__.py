"""The configuration: frozen dataclasses, built by a file in `configs/`, changed by flags, saved with the run.

Every field is checked when the object is built, so any `Config` can run, as far as that can be known without the data
and the devices. Nothing here imports JAX, because the runtime is set up from the configuration.
"""

from gpt_jax.config.check import check, check_types
from gpt_jax.config.clean import CleanConfig, DedupName, NormalizeName
from gpt_jax.config.config import Config, with_vocabulary
from gpt_jax.config.files import config_from_dict, config_to_dict, load_config, load_saved_config
from gpt_jax.config.model import (
    HOW_IT_RUNS,
    LORA_TARGETS,
    ActivationName,
    AttentionName,
    CacheDTypeName,
    DTypeName,
    LoraConfig,
    ModelConfig,
    NormName,
    PositionsName,
    QuantizeName,
    RematName,
    RopeConfig,
    RopeScalingName,
    StoredDType,
)
from gpt_jax.config.objective import DpoConfig, GrpoConfig, ObjectiveConfig, ObjectiveName
from gpt_jax.config.training import (
    DataConfig,
    OptimizerConfig,
    ParallelConfig,
    ScheduleName,
    TextConfig,
    TokenizerType,
    TrainConfig,
)

__all__ = [
    "HOW_IT_RUNS",
    "LORA_TARGETS",
    "ActivationName",
    "AttentionName",
    "CacheDTypeName",
    "CleanConfig",
    "Config",
    "DTypeName",
    "DataConfig",
    "DedupName",
    "DpoConfig",
    "GrpoConfig",
    "LoraConfig",
    "ModelConfig",
    "NormName",
    "NormalizeName",
    "ObjectiveConfig",
    "ObjectiveName",
    "OptimizerConfig",
    "ParallelConfig",
    "PositionsName",
    "QuantizeName",
    "RematName",
    "RopeConfig",
    "RopeScalingName",
    "ScheduleName",
    "StoredDType",
    "TextConfig",
    "TokenizerType",
    "TrainConfig",
    "check",
    "check_types",
    "config_from_dict",
    "config_to_dict",
    "load_config",
    "load_saved_config",
    "with_vocabulary",
]
