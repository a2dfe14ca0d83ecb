"""Uploading a trained model to the Hugging Face hub: only where push_to_hub asks for it."""

from pathlib import Path
from typing import Any

from burnish.config.errors import UserError

# What a run leaves that a model's users read. Checkpoints, logs and whatever else lies in the folder stay here.
_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "vocab.txt", "merges.txt", "README.md"]
_NOT = ["checkpoint-*", "abandoned-*", ".*", "runs/*", "state.json"]


def check_hub(config: Any) -> None:
    """Raises UserError where push_to_hub is asked for and the hub would not take the upload: no token, no network."""
    if not config.push_to_hub:
        return
    from huggingface_hub import HfApi

    try:
        found = HfApi(token=config.hub_token).whoami()
    except Exception as error:  # of requests, of the hub, of a missing token: all mean that nothing could be uploaded
        raise _failed("the hub doesn't take uploads from here", error, config.origins["push_to_hub"]) from error
    role = ((found.get("auth") or {}).get("accessToken") or {}).get("role")
    if role == "read":
        raise UserError(
            "the hub's token may only read",
            where=config.origins["push_to_hub"],
            mend="Make one that may write (hf auth login), or delete push_to_hub",
        )


def push(config: Any, folder: Path, message: str = "Trained with burnish") -> str:
    """Upload the model in `folder` to hub_model_id (default: the folder's name, under the token's owner): its address.

    Raises UserError where that fails; the folder is as it was.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=config.hub_token)
    name = config.hub_model_id or folder.resolve().name
    try:
        repo = api.create_repo(name, private=config.hub_private_repo, exist_ok=True)
        api.upload_folder(
            repo_id=repo.repo_id,
            folder_path=str(folder),
            commit_message=message,
            revision=config.hub_revision,
            allow_patterns=_FILES,
            ignore_patterns=_NOT,
        )
    except Exception as error:
        raise _failed(f"the model is saved, its upload failed; afterwards: hf upload {name} {folder}", error) from error
    return str(repo)


def _failed(what: str, error: Exception, where: str = "push_to_hub") -> UserError:
    reason = " ".join(str(error).split())[:200]
    return UserError(f"{what} ({type(error).__name__}: {reason})", where=where, mend="Log in with: hf auth login")
