"""A model folder to the Hugging Face hub, through its own client."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vlft.errors import ModelError


def check(repository: str) -> None:
    """Ask the hub whether it knows the token: before a model is loaded and written for nothing.

    Raises:
        ModelError: no token, one that the hub does not know, or no network.
    """
    from huggingface_hub import HfApi, errors

    api = HfApi()
    with _explained(f"{repository} cannot be pushed to", str(api.endpoint), "nothing was written"):
        _need_token(api.token)
        try:
            api.whoami()
        except errors.HfHubHTTPError as error:
            if error.response is None or error.response.status_code == 401:
                raise
            # A mirror that has no such question, or too many of them: the push itself will tell.


def upload_command(folder: Path, repository: str, *, private: bool) -> str:
    """Uploads a finished folder without writing it again."""
    return shlex.join(["hf", "upload", repository, str(folder), *(["--private"] if private else [])])


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
    again = upload_command(folder, repository, private=private)
    state = f"the folder itself is complete: '{again}' uploads it as it is"
    with _explained(f"{folder} was not pushed to {repository}", str(api.endpoint), state):
        _need_token(api.token)
        made = api.create_repo(repository, private=private, repo_type="model", exist_ok=True)
        api.upload_folder(
            repo_id=made.repo_id, folder_path=folder, repo_type="model", commit_message="Upload from vlft export"
        )
    return str(made)


class _NoTokenError(Exception):
    """There is none to be sent."""


def _need_token(given: str | bool | None) -> None:
    from huggingface_hub import get_token

    if given is None and not get_token():
        raise _NoTokenError


@contextmanager
def _explained(head: str, endpoint: str, state: str) -> Iterator[None]:
    """The client's errors as one sentence each.

    Args:
        head: what was not done.
        state: of the folder, now.
    """
    from huggingface_hub import errors

    def told(found: str, advice: str) -> ModelError:
        return ModelError(f"{head}: {found}; {advice} ({state}).")

    try:
        yield
    except _NoTokenError:
        raise told("there is no token", "log in with 'hf auth login', or set HF_TOKEN") from None
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
    except Exception as error:  # of whichever HTTP library the client uses
        raise told(f"{endpoint} cannot be reached ({_short(error)})", "check the network and try again") from error


def _short(error: Exception) -> str:
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return text if len(text) <= 160 else text[:160] + " ..."
