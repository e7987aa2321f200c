# SPDX-License-Identifier: MIT OR Apache-2.0
"""Compress Mixture-of-Experts checkpoints by low-rank factors, read what was planned, and load the result.

If transformers and torch are installed, importing this package registers the classes of compressed models with transformers'
Auto classes. `from_pretrained` then uses them without `trust_remote_code`.
"""

from importlib.util import find_spec

from .plan import Matrix, Plan, read_plan
from .program import CompressError, compress

if find_spec("transformers") and find_spec("torch"):
    from .registration import register

    register()

__all__ = ["CompressError", "Matrix", "Plan", "compress", "read_plan"]
