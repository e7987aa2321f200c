"""Loading without remote code. transformers asks at the terminal where it would need some, and tests have none."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

import lowrank_compress

IDS = torch.arange(48)[None] % 30


def test_the_packages_class_is_used_without_asking(compressed):
    model = AutoModelForCausalLM.from_pretrained(compressed)
    assert type(model).__module__ == "lowrank_compress.models.modeling_lowrank_mixtral"
    assert type(AutoConfig.from_pretrained(compressed)).__module__.startswith("lowrank_compress.models.")


def test_it_computes_what_the_code_beside_the_checkpoint_computes(compressed):
    local = AutoModelForCausalLM.from_pretrained(compressed, dtype=torch.float32).eval()
    remote = AutoModelForCausalLM.from_pretrained(compressed, dtype=torch.float32, trust_remote_code=True).eval()
    with torch.no_grad():
        assert torch.equal(local(IDS).logits, remote(IDS).logits)


def test_other_auto_classes(compressed):
    assert type(AutoModel.from_pretrained(compressed)).__name__ == "LowRankMixtralModel"
    classifier = AutoModelForSequenceClassification.from_pretrained(compressed, num_labels=3, dtype=torch.float32)
    assert classifier(IDS).logits.shape == (1, 3)


def test_the_tokenizer_needs_no_remote_code(compressed):
    try:
        assert len(AutoTokenizer.from_pretrained(compressed)("a whale")["input_ids"]) > 0
    except ValueError as error:
        # The bundled model was saved by transformers 5, whose name for a plain fast tokenizer 4 does not know.
        assert "TokenizersBackend" in str(error)


def test_a_saved_model_keeps_its_code(compressed, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(compressed, dtype=torch.float32).eval()
    model.save_pretrained(tmp_path)
    for file in ("modeling_lowrank_mixtral.py", "configuration_lowrank_mixtral.py", "lowrank_experts.py"):
        assert (tmp_path / file).read_text() == (compressed / file).read_text()
    for options in ({}, {"trust_remote_code": True}):
        again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, **options).eval()
        with torch.no_grad():
            assert torch.allclose(again(IDS).logits, model(IDS).logits, atol=1e-4)


@pytest.mark.parametrize("family", ["qwen3-moe", "qwen2-moe", "olmoe", "glm4-moe", "deepseek-v3", "deepseek-v2", "phimoe"])
def test_every_family_loads(family, family_bases, tmp_path):
    lowrank_compress.compress(family_bases[family], tmp_path / "out", budget="20%", calibrate="none", quiet=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model).__module__.startswith("lowrank_compress.models.")
    assert model(IDS).logits.isfinite().all()


def test_a_class_that_leaves_out_a_scale_of_scores_is_refused(family_bases, tmp_path):
    lowrank_compress.compress(family_bases["deepseek-v2"], tmp_path / "out", budget="20%", calibrate="none", quiet=True)
    path = tmp_path / "out/config.json"
    config = json.loads(path.read_text())
    for rotation in ("rope_scaling", "rope_parameters"):
        config[rotation]["mscale_all_dim"] = 0.707
    path.write_text(json.dumps(config))
    load = lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    if transformers.__version__.startswith("4."):
        with pytest.raises(ValueError, match="mscale_all_dim"):
            load()
    else:
        attention = load().model.layers[0].self_attn
        assert attention.scaling > attention.qk_head_dim**-0.5


def test_a_class_that_turns_long_texts_by_the_factors_of_short_ones_refuses_them(family_bases, tmp_path):
    lowrank_compress.compress(family_bases["phimoe"], tmp_path / "out", budget="20%", calibrate="none", quiet=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    trained = model.config.original_max_position_embeddings
    ids = torch.arange(trained + 1)[None] % 30
    assert model(ids[:, :trained]).logits.isfinite().all()
    if transformers.__version__.startswith("4."):
        assert model(ids).logits.isfinite().all()
    else:
        with pytest.raises(ValueError, match="long_factor"):
            model(ids)
        # Where both factors are the same, there is nothing to choose.
        rotation = model.config.rope_parameters
        rotation["long_factor"] = rotation["short_factor"]
        assert model(ids).logits.isfinite().all()


def test_a_worker_process_can_load_what_it_gets(compressed):
    code = f"""
import pickle, sys, lowrank_compress
from transformers import AutoConfig
config = AutoConfig.from_pretrained({str(compressed)!r})
sys.stdout.buffer.write(pickle.dumps(config))
"""
    pickled = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout
    loader = "import pickle, sys; print(type(pickle.load(sys.stdin.buffer)).__name__)"
    read = subprocess.run([sys.executable, "-c", loader], input=pickled, check=True, capture_output=True)
    assert read.stdout.strip() == b"LowRankMixtralConfig"


@pytest.mark.skipif(transformers.__version__ < "5", reason="transformers 4 reads fp8 on GPUs alone")
def test_fp8_that_transformers_would_widen_wrongly_is_refused(compressed, tmp_path):
    model = tmp_path / "fp8"
    shutil.copytree(compressed, model)
    config = json.loads((model / "config.json").read_text())
    # Of the model's sides, 128 is no multiple of 48.
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [48, 48]}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"would widen the fp8 weights of layers\.0\.self_attn\.q_proj wrongly"):
        AutoModelForCausalLM.from_pretrained(model)
