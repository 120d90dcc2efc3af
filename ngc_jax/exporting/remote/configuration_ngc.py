# Copyright The ngc-jax authors. SPDX-License-Identifier: Apache-2.0
"""The configuration of a model of neuronal groups: its architecture's own, and the groups."""

from transformers import LlamaConfig as BaseConfig


class NgcConfig(BaseConfig):
    """The settings of the architecture; `ngc["groups"]` and `ngc["dense"]` describe its weight matrices."""

    model_type = "ngc"
