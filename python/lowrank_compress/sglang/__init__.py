# SPDX-License-Identifier: MIT OR Apache-2.0
"""SGLang's classes of compressed models: `SGLANG_EXTERNAL_MODEL_PACKAGE=lowrank_compress.sglang`."""
