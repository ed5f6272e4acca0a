"""A model folder to the Hugging Face hub, through its own client."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vlft.errors import ModelError


def push(folder: Path, repository: str, *, private: bool) -> str:
    """Make the repository if there is none and upload all files of `folder` in one commit; its address.

    Args:
        repository: "owner/name".
        private: of a new repository; one that is there stays as it is.
    Raises:
        ModelError: no token, no network, no permission, or whatever else the hub answers.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with _explained(folder, repository, str(api.endpoint)):
        if api.token is None and not _token():
            advice = "log in with 'hf auth login', or set HF_TOKEN"
            raise ModelError(_sentence(folder, repository, "there is no token", advice))
        made = api.create_repo(repository, private=private, repo_type="model", exist_ok=True)
        api.upload_folder(
            repo_id=made.repo_id, folder_path=folder, repo_type="model", commit_message="Upload from vlft export"
        )
    return str(made)


def _token() -> str | None:
    from huggingface_hub import get_token

    return get_token()


def _sentence(folder: Path, repository: str, found: str, advice: str) -> str:
    return f"{folder} was not pushed to {repository}: {found}; {advice} (the folder itself is complete)."


@contextmanager
def _explained(folder: Path, repository: str, endpoint: str) -> Iterator[None]:
    """The client's errors as one sentence each."""
    from huggingface_hub import errors

    def told(found: str, advice: str) -> ModelError:
        return ModelError(_sentence(folder, repository, found, advice))

    try:
        yield
    except errors.HFValidationError as error:
        raise told(f"the hub does not take that name ({_short(error)})", "give OWNER/NAME") from error
    except errors.HfHubHTTPError as error:
        code = error.response.status_code if error.response is not None else 0
        if code == 401:
            raise told("the hub does not know the token", "log in again with 'hf auth login'") from error
        if code in (403, 404):
            advice = "give a token with write permission, or another owner"
            raise told(f"the token may not write there (the hub answered {code})", advice) from error
        raise told(f"the hub answered {code} ({_short(error)})", "try again") from error
    except errors.OfflineModeIsEnabled as error:
        raise told("HF_HUB_OFFLINE is set", "unset it, and push again") from error
    except ModelError:
        raise
    except Exception as error:  # of whichever HTTP library the client uses
        raise told(f"{endpoint} cannot be reached ({_short(error)})", "check the network and try again") from error


def _short(error: Exception) -> str:
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return text if len(text) <= 160 else text[:160] + " ..."
