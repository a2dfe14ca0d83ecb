"""Uploads: only when asked, only the model's own files, checked before the training, and no loss when they fail."""

import types

import huggingface_hub
import pytest

from burnish.config.errors import UserError
from burnish.config.fields import SFTConfig
from burnish.hub import check_hub, push
from burnish.run import assemble, train

ROWS = [{"text": f"seven small cats count to {n}"} for n in range(12)]


class FakeApi:
    """The hub's client with nothing behind it: keeps what it was asked, and which files an upload would take."""

    role, fails, calls = "write", "", []

    def __init__(self, token=None):
        self.token = token
        FakeApi.calls = [*FakeApi.calls, ("token", token)]

    def _asked(self, name, given):
        FakeApi.calls = [*FakeApi.calls, (name, given)]
        if FakeApi.fails == name:
            raise OSError("no route\nto the hub")

    def whoami(self):
        self._asked("whoami", {})
        return {"name": "me", "auth": {"accessToken": {"role": FakeApi.role}}}

    def create_repo(self, name, **given):
        self._asked("create_repo", {"name": name, **given})
        return huggingface_hub.RepoUrl(f"https://huggingface.co/me/{name.split('/')[-1]}")

    def upload_folder(self, **given):
        from pathlib import Path

        from huggingface_hub.utils import filter_repo_objects

        root = Path(given["folder_path"])
        found = [str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()]
        kinds = {"allow_patterns": given["allow_patterns"], "ignore_patterns": given["ignore_patterns"]}
        self._asked("upload_folder", {**given, "files": sorted(filter_repo_objects(found, **kinds))})


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    FakeApi.role, FakeApi.fails, FakeApi.calls = "write", "", []
    return FakeApi


def asked(name) -> list[dict]:
    return [given for kind, given in FakeApi.calls if kind == name]


def config(folder, model, **given) -> SFTConfig:
    common = {"model_name_or_path": model, "max_steps": 2, "save_steps": 1, "use_cpu": True}
    return SFTConfig(str(folder), **common | given)


def test_nothing_is_uploaded_unless_asked(tmp_path, tiny_model, hub):
    train(config(tmp_path, tiny_model, hub_model_id="me/foxes", hub_token="t"), train_dataset=ROWS)
    assert hub.calls == []


def test_the_model_and_its_card_are_uploaded_and_nothing_else(tmp_path, tiny_model, hub):
    tmp_path = tmp_path / "foxes"
    given = {"push_to_hub": True, "hub_token": "t", "hub_private_repo": True, "hub_revision": "v1"}
    train(config(tmp_path, tiny_model, **given), train_dataset=ROWS)
    assert {token for kind, token in hub.calls if kind == "token"} == {"t"}
    assert asked("create_repo") == [{"name": "foxes", "private": True, "exist_ok": True}]
    (upload,) = asked("upload_folder")
    assert (upload["repo_id"], upload["revision"]) == ("me/foxes", "v1")
    assert (tmp_path / "checkpoint-2").is_dir() and (tmp_path / "metrics.jsonl").is_file()
    expected = {"README.md", "config.json", "generation_config.json", "model.safetensors"}
    expected |= {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert set(upload["files"]) == expected


def test_a_hub_that_refuses_is_told_before_the_training(tmp_path, tiny_model, hub):
    hub.fails = "whoami"
    with pytest.raises(UserError) as error:
        assemble(config(tmp_path, tiny_model, push_to_hub=True), train_dataset=ROWS)
    assert "SFTConfig(push_to_hub=...)" in str(error.value) and "no route to the hub" in str(error.value)
    hub.fails, hub.role = "", "read"
    with pytest.raises(UserError, match="may only read"):
        check_hub(config(tmp_path, tiny_model, push_to_hub=True))


def test_a_failed_upload_leaves_the_model_and_says_how_to_go_on(tmp_path, tiny_model, hub):
    hub.fails = "upload_folder"
    with pytest.raises(UserError) as error:
        train(config(tmp_path, tiny_model, push_to_hub=True, hub_model_id="me/foxes"), train_dataset=ROWS)
    assert f"hf upload me/foxes {tmp_path}" in str(error.value) and "\n" not in str(error.value)
    assert (tmp_path / "model.safetensors").is_file() and (tmp_path / "README.md").is_file()


def test_push_gives_the_address(tmp_path, hub):
    given = types.SimpleNamespace(hub_token=None, hub_model_id="me/foxes", hub_private_repo=None, hub_revision=None)
    assert push(given, tmp_path) == "https://huggingface.co/me/foxes"
    assert asked("upload_folder")[0]["files"] == []
