"""Runs against a checkout: PYTHONPATH=python, LOWRANK_COMPRESS=the program, or a build of it in target/."""

import os
from pathlib import Path

import pytest

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
ROOT = Path(__file__).parents[2]
BUILDS = ("release/lowrank-compress", "debug/lowrank-compress")


@pytest.fixture(scope="session", autouse=True)
def program():
    if "LOWRANK_COMPRESS" not in os.environ:
        built = [ROOT / "target" / build for build in BUILDS if (ROOT / "target" / build).is_file()]
        if built:
            os.environ["LOWRANK_COMPRESS"] = str(built[0])


@pytest.fixture(scope="session")
def base():
    return ROOT / "tests/fixtures/tiny-mixtral"


@pytest.fixture(scope="session")
def family_bases():
    return {name: ROOT / "tests/fixtures/golden" / name for name in ("qwen3-moe", "qwen2-moe", "olmoe", "glm4-moe", "deepseek-v3", "deepseek-v2", "phimoe")}


@pytest.fixture(scope="session")
def compressed(base, tmp_path_factory):
    import lowrank_compress

    out = tmp_path_factory.mktemp("out") / "small"
    lowrank_compress.compress(base, out, budget="20%", calibrate="none", quiet=True)
    return out
