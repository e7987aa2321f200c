"""The operator that SGLang takes of vLLM on CPUs without AMX."""


def rotary_embedding(positions, query, key, head_size, cos_sin_cache, is_neox):
    """Turns the heads of query and key [tokens, heads * head_size] in place."""
    assert is_neox
    cos, sin = (half[:, None] for half in cos_sin_cache[positions.flatten()].chunk(2, dim=-1))
    width = cos.shape[-1]
    for heads in (query, key):
        heads = heads.view(positions.numel(), -1, head_size)
        first, second = heads[..., :width].clone(), heads[..., width : 2 * width].clone()
        heads[..., :width] = first * cos - second * sin
        heads[..., width : 2 * width] = second * cos + first * sin
