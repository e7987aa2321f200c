"""Runs token ids through an engine of SGLang on the CPU, in SGLang's own environment.

    python tests/serving/sglang_engine.py MODEL TOKENS LIKELIEST < prompts.json

Prints `ANSWERS` and a list of {token_ids, prompt_logprobs, logprobs} in the form of vLLM's server, in f32.
"""

import json
import sys

# Registers the classes of compressed models; SGLang's processes import this file, too.
import lowrank_compress  # noqa: F401
import sglang


def answer(output):
    """One answer of SGLang as vLLM's server would give it."""
    about = output["meta_info"]
    prompt = [None] + [{str(token): {"logprob": value}} for value, token, _ in about["input_token_logprobs"][1:]]
    likeliest = [{f"token_id:{token}": value for value, token, _ in row} for row in about["output_top_logprobs"]]
    return {"token_ids": output["output_ids"], "prompt_logprobs": prompt, "logprobs": {"top_logprobs": likeliest}}


if __name__ == "__main__":
    model, tokens, likeliest = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    engine = sglang.Engine(
        model_path=model, device="cpu", attention_backend="torch_native", dtype="float32", mem_fraction_static=0.1,
        max_total_tokens=4096, disable_radix_cache=True, disable_cuda_graph=True, log_level="error",
    )  # fmt: skip
    outputs = engine.generate(
        input_ids=json.load(sys.stdin), sampling_params={"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True},
        return_logprob=True, logprob_start_len=0, top_logprobs_num=likeliest,
    )  # fmt: skip
    print("ANSWERS", json.dumps([answer(output) for output in outputs]))
    engine.shutdown()
