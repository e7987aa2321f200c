# SPDX-License-Identifier: MIT OR Apache-2.0
"""Registers the classes of compressed models with transformers."""

from importlib import import_module

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from . import models

_AUTO = {
    "Model": AutoModel,
    "ForCausalLM": AutoModelForCausalLM,
    "ForSequenceClassification": AutoModelForSequenceClassification,
}


def register() -> None:
    """Makes `from_pretrained` find the classes of every family. A saved model gets their code, as compressed ones have it."""
    for family in models.FAMILIES:
        name, kind = f"LowRank{family['class']}", family["model_type"]
        config = getattr(import_module(f"{models.__name__}.configuration_{kind}"), f"{name}Config")
        modeling = import_module(f"{models.__name__}.modeling_{kind}")
        AutoConfig.register(kind, config, exist_ok=True)
        config.register_for_auto_class()
        for task, auto in _AUTO.items():
            model = getattr(modeling, f"{name}{task}")
            auto.register(config, model, exist_ok=True)
            model.register_for_auto_class(auto.__name__)
