"""Compressing, and reading what was planned."""

import json

import pytest

import lowrank_compress
from lowrank_compress.program import _flags


def test_flags_have_dashes_and_repeat():
    flags = _flags({"budget": "20%", "keep_dense": ["a", "b"], "restart": True, "quiet": False, "seed": 0, "cache": None})
    assert flags == ["--budget=20%", "--keep-dense=a", "--keep-dense=b", "--restart", "--seed=0"]


def test_compress_returns_what_it_removed(base, tmp_path, capfd):
    plan = lowrank_compress.compress(base, tmp_path / "out", budget=1_000_000, calibrate="none", storage="uv")
    assert plan.params_before - plan.params_after >= 1_000_000
    assert plan.storage == "uv"
    assert plan.ranks() == json.loads((tmp_path / "out/config.json").read_text())["lowrank_config"]["ranks"]
    assert "factor and write" in capfd.readouterr().err


def test_a_refusal_is_an_error_with_the_programs_words(base, tmp_path):
    with pytest.raises(lowrank_compress.CompressError, match="no-such-method") as error:
        lowrank_compress.compress(base, tmp_path / "out", budget="20%", method="no-such-method")
    assert error.value.code == 2
    assert not (tmp_path / "out").exists()


def test_a_plan_is_read_from_a_folder_and_from_its_file(compressed):
    plan = lowrank_compress.read_plan(compressed)
    assert plan == lowrank_compress.read_plan(compressed / "lowrank_report.json")
    assert len(plan.matrices) == 96
    first = plan.matrices[0]
    assert (first.layer, first.expert, first.projection, first.rows, first.cols) == (0, 0, "gate", 448, 128)


def test_a_plan_before_its_execution_is_read(base, tmp_path):
    lowrank_compress.program._run(
        ["plan", "--quiet", "--calibrate=none", "--budget=20%", f"--model={base}", f"--plan-out={tmp_path / 'plan.json'}"]
    )
    plan = lowrank_compress.read_plan(tmp_path)
    assert plan.params_before == 5969024
    assert plan.matrices[0].cols == 128


def test_a_table_has_a_row_for_every_matrix(compressed):
    pytest.importorskip("pandas")
    table = lowrank_compress.read_plan(compressed).table()
    assert len(table) == 96
    assert str(table["rank"].dtype) == "Int64"


def test_widths_are_read_from_a_report_and_from_a_plan(base, tmp_path):
    settings = {"budget": "40%", "calibration_tokens": 2048, "sensitivity_tokens": 512, "quiet": True}
    made = lowrank_compress.compress(base, tmp_path / "out", **settings)
    widths = json.loads((tmp_path / "out/config.json").read_text())["lowrank_config"]["widths"]
    assert widths
    found = {row.name.rsplit(".", 1)[0]: row.width for row in made.matrices if row.width != 448}
    assert found == widths
    flags = lowrank_compress.program._flags({**settings, "model": base, "plan_out": tmp_path / "plan.json"})
    lowrank_compress.program._run(["plan", *flags])
    planned = lowrank_compress.read_plan(tmp_path / "plan.json")
    assert [row.width for row in planned.matrices] == [row.width for row in made.matrices]


def test_a_shared_expert_is_read_under_its_name(family_bases, tmp_path):
    settings = {"calibrate": "none", "shared_experts": "compress", "fix_rank": [r"shared_expert\.gate_proj$=9"], "quiet": True}
    made = lowrank_compress.compress(family_bases["qwen2-moe"], tmp_path / "out", budget="10%", **settings)
    shared = [row for row in made.matrices if row.expert == "shared"]
    assert [(row.layer, row.projection, row.width) for row in shared[:2]] == [(0, "gate", 40), (0, "down", 40)]
    assert made.ranks()["model.layers.1.mlp.shared_expert.gate_proj"] == 9
    pytest.importorskip("pandas")
    assert len(made.table()) == len(made.matrices)


def test_what_is_no_plan_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="plan.json"):
        lowrank_compress.read_plan(tmp_path)
    (tmp_path / "plan.json").write_text('{"matrices": []}')
    with pytest.raises(ValueError, match="neither a report nor a plan"):
        lowrank_compress.read_plan(tmp_path)
