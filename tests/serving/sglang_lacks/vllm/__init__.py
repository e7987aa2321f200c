"""A stand-in: SGLang takes one operator of vLLM on CPUs without AMX."""
