"""The model card says what the record says, in a form that the hub reads."""

from __future__ import annotations

import pytest
from huggingface_hub import ModelCard

from tamba.card import model_card, write_card
from tamba.errors import UserError
from tamba.report import Layers, PlanLayer, Record, write_report
from test_report import ODD, full_record, suites


def test_the_hub_reads_the_front_matter():
    record = full_record(teacher="someone/some-model", suites=suites())
    data = ModelCard(model_card(record)).data
    assert data.base_model == "someone/some-model"
    assert data.library_name == "transformers"
    assert data.tags == ["tamba", "hybrid", "mamba2"]
    results = {(r.dataset_name, r.metric_type): r.metric_value for r in data.eval_results}
    assert results["held-out text", "perplexity_ratio"] == 1.1
    assert results["task", "acc"] == 0.4


def test_a_folder_is_no_base_model():
    assert ModelCard(model_card(full_record(teacher="../some/folder"))).data.base_model is None


def test_the_text_says_what_was_found():
    text = model_card(full_record(suites=suites(), recipe="a = '```'"))
    for said in (
        "2 of its 5 layers are Mamba-2 layers now",
        "is 20.00 (1.100 times)",
        "| task | acc | 40.0 % ± 2.0 | 50.0 % ± 2.0 | 200 |",
        "1 Mamba-2 (converted)",
        "align (5,900 tokens)",
        "````toml\na = '```'\n````",
        ODD,
    ):
        assert said in text, said
    bare = model_card(Record(name="bare"))
    assert "Versions: unknown" in bare
    assert "## Results" not in bare


def test_transplanted_layers_make_a_hybrid_too():
    plan = [
        PlanLayer(mixer="attention", origin="kept", source="teacher", source_layer=0),
        PlanLayer(mixer="mamba1", origin="transplanted", source="donor", source_layer=7),
        PlanLayer(mixer="mamba1", origin="transplanted", source="donor", source_layer=8),
    ]
    text = model_card(full_record(plan=plan, layers=Layers(total=3, converted=0)))
    assert "A hybrid made from `the teacher`" in text
    assert "its 3 layers are 2 Mamba-1 (transplanted), 1 kept." in text
    assert "A hybrid" not in model_card(full_record(plan=plan[:1]))


def test_a_card_is_whole_or_not_there(tmp_path, monkeypatch):
    write_report(full_record(), tmp_path / "run", html=False)
    card = write_card(tmp_path / "run", tmp_path / "README.md")
    assert card.read_text() == model_card(full_record())
    with pytest.raises(UserError, match=r"missing/README\.md"):
        write_card(tmp_path / "run", tmp_path / "missing" / "README.md")
    with pytest.raises(UserError, match="No such file"):
        write_card(tmp_path / "nothing", tmp_path / "README.md")
