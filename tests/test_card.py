"""The model card says what the run knows and nothing else, and never replaces somebody's own README.md."""

import json

import pytest
import yaml

from burnish.card import _LOSSES, Facts, card, is_ours, objective, write_card
from burnish.config.fields import SFTConfig
from burnish.config.preference import (
    DPO_LOSSES,
    BCOConfig,
    CPOConfig,
    DPOConfig,
    KTOConfig,
    ORPOConfig,
    RewardConfig,
)
from burnish.run import train
from burnish.trainers import SFTTrainer

ROWS = [{"text": f"seven small cats count to {n}"} for n in range(12)]


def facts(config, **given) -> Facts:
    common = {
        "config": config, "model": "", "rows": 3, "trained": (8, 1000), "adapter": False,
        "history": [{"loss": 2.0, "step": 1}, {"loss": 1.25, "step": 2}, {"train_loss": 1.5, "num_tokens": 12345}],
        "about": {"hardware": "1 x Abacus"},
    }  # fmt: skip
    return Facts(**common | given)


def header(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def rows_of(text: str) -> dict[str, str]:
    cells = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return {cell[0]: cell[1] for cell in cells if len(cell) == 2}


def test_a_run_writes_its_own_numbers(tmp_path, tiny_model):
    config = SFTConfig(
        str(tmp_path), model_name_or_path=tiny_model, max_steps=3, logging_steps=1, use_cpu=True, test_split_size=2
    )
    train(config, train_dataset=ROWS)
    text = (tmp_path / "README.md").read_text()
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    shown = rows_of(text)
    last = [record for record in records if "loss" in record][-1]
    assert float(shown["loss"]) == pytest.approx(last["loss"], rel=1e-5)
    assert float(shown["train_loss"]) == pytest.approx(records[-1]["train_loss"], rel=1e-5)
    assert shown["num_tokens"].replace(",", "") == str(records[-1]["num_tokens"])
    assert shown["data"].startswith("10 rows") and "full parameters" in shown["trained"]
    assert "torch" in shown["versions"] and "CPU" in shown["hardware"]
    assert header(text) == {"library_name": "transformers", "tags": ["burnish", "sft"]}
    assert str(tmp_path) not in text and tiny_model not in text, "folders of this machine are nobody's business"


def test_an_adapters_card_is_burnishs_and_not_pefts_form(tmp_path, tiny_model):
    given = {"max_steps": 1, "use_cpu": True, "use_peft": True, "lora_r": 4}
    train(SFTConfig(str(tmp_path), model_name_or_path=tiny_model, **given), train_dataset=ROWS)
    text = (tmp_path / "README.md").read_text()
    assert is_ours(text) and "More Information Needed" not in text and "LoRA of rank 4" in text
    assert header(text)["library_name"] == "peft"
    assert not (tmp_path / "checkpoint-1" / "README.md").exists()


@pytest.mark.parametrize("peft", [False, True])
def test_somebodys_own_readme_stays(tmp_path, tiny_model, peft, capsys):
    (tmp_path / "README.md").write_text("# my notes\n")
    given = {"max_steps": 1, "use_cpu": True, "use_peft": peft}
    train(SFTConfig(str(tmp_path), model_name_or_path=tiny_model, **given), train_dataset=ROWS)
    assert (tmp_path / "README.md").read_text() == "# my notes\n"
    assert "is somebody's own: left as it is" in capsys.readouterr().out


def test_an_edited_card_stays_and_an_untouched_one_is_written_anew(tmp_path):
    path = tmp_path / "README.md"
    assert write_card(tmp_path, facts(SFTConfig("a")))
    first = path.read_text()
    assert write_card(tmp_path, facts(SFTConfig("a"), rows=77)) and "77 rows" in path.read_text() != first
    path.write_text(path.read_text().replace("77 rows", "the best rows"))
    assert not write_card(tmp_path, facts(SFTConfig("a"))) and "the best rows" in path.read_text()
    assert [file.name for file in tmp_path.iterdir()] == ["README.md"]


def test_the_header_names_what_is_on_the_hub(tmp_path):
    config = SFTConfig(str(tmp_path), dataset_name="owner/rows", use_peft=True, load_in_4bit=True)
    text = card(facts(config, model="owner/model-1B", adapter=True))
    expected = {"base_model": "owner/model-1B", "library_name": "peft", "tags": ["burnish", "sft", "lora"]}
    assert header(text) == expected | {"datasets": ["owner/rows"]}
    assert "on a base in 4 bits" in text


@pytest.mark.parametrize("name", ["./model", "/models/big", "model", "~/a/b", "a/b/c", "rows.jsonl"])
def test_a_local_name_is_no_name_on_the_hub(name):
    text = card(facts(SFTConfig("out", dataset_name=name), model=name))
    assert set(header(text)) == {"library_name", "tags"} and "/models" not in text


def test_a_folder_that_looks_like_a_hub_id_is_local(tmp_path, monkeypatch):
    (tmp_path / "owner" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert "base_model" not in header(card(facts(SFTConfig("out"), model="owner/model")))


def test_last_values_win_and_a_bar_does_not_break_the_table():
    text = card(facts(SFTConfig("out", dataset_name="a|b"), about={"hardware": "x | y"}))
    assert rows_of(text)["loss"] == "1.25" and rows_of(text)["num_tokens"] == "12,345"
    assert "x \\| y" in text and "a\\|b" in text


def test_every_loss_has_its_name():
    kinds = {("dpo", name) for name in DPO_LOSSES}
    for cls in (SFTConfig, CPOConfig, KTOConfig):
        choices = cls.__dataclass_fields__["loss_type"].metadata["choices"]
        kinds |= {(cls.__name__.removesuffix("Config").lower(), name) for name in choices}
    assert kinds <= set(_LOSSES)
    for cls in (ORPOConfig, BCOConfig, RewardConfig):
        assert objective(cls("out")), cls


def test_a_mix_of_losses_shows_weights_and_papers():
    shown = objective(DPOConfig("out", loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.1], beta=0.2))
    assert shown.startswith("1 x logistic loss") and "+ 0.1 x negative log-likelihood of the chosen" in shown
    assert "[arXiv 2305.18290](https://arxiv.org/abs/2305.18290)" in shown and shown.endswith("beta 0.2")


def test_a_script_asks_for_the_card_by_trls_name(tmp_path, tiny_model):
    config = SFTConfig(str(tmp_path), model_name_or_path=tiny_model, max_steps=1, use_cpu=True)
    trainer = SFTTrainer(args=config, train_dataset=ROWS)
    trainer.create_model_card(model_name="cats", dataset_name="owner/cats", tags="felines")
    text = (tmp_path / "README.md").read_text()
    assert header(text)["tags"] == ["burnish", "sft", "felines"] and header(text)["datasets"] == ["owner/cats"]
    assert "\n# cats\n" in text and is_ours(text) and rows_of(text)["data"].startswith("`owner/cats`, 12 rows")
    trainer.create_model_card()
    assert header((tmp_path / "README.md").read_text())["tags"] == ["burnish", "sft"]
    assert trainer.args.dataset_name is None, "a card's words are not the run's settings"
