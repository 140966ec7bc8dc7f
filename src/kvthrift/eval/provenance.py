"""With what a run was made: versions, commit, machine, command. Knows nothing of what was run."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel

import kvthrift
from kvthrift.integrations.transformers.facts import attention_modules, weights_fingerprint

VARIABLE = "KVTHRIFT_COMMIT"

Session = dict[str, str]
"""What one start of a run was made with; ``weights`` must be the same in every one."""


def session(model: PreTrainedModel) -> Session:
    """This process, this machine, this model."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": _command(),
        "kvthrift": kvthrift.__version__,
        "commit": commit(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": _device(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "weights": weights_fingerprint(model.config, attention_modules(model)),
    }


def _command() -> str:
    """What was typed, without where the program lies."""
    name = Path(sys.argv[0]).name
    return shlex.join(["kvthrift" if name == "__main__.py" else name, *sys.argv[1:]])


def commit() -> str:
    """The commit of the checkout that kvthrift runs from, "+" if it was changed since.

    Outside of one: what the environment's KVTHRIFT_COMMIT says, else "none".
    """
    package = Path(kvthrift.__file__).parent
    home = _git(package, "rev-parse", "--show-toplevel")
    if not home or Path(home) / "src" / "kvthrift" != package.resolve():
        return (
            os.environ.get(VARIABLE) or "none"
        )  # an installed package; the checkout around it, if any, is somebody else's
    found = _git(package, "rev-parse", "--short", "HEAD")
    changed = _git(package, "status", "--porcelain", "--untracked-files=no", "--", str(package))
    return f"{found}{'+' if changed else ''}" if found else "none"


def _git(where: Path, *words: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(where), *words], capture_output=True, text=True, check=False, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"
