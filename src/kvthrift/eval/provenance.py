"""With what a run was made: versions, commit, machine, command. Knows nothing of what was run."""

from __future__ import annotations

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

Session = dict[str, str]
"""What one start of a run was made with; ``weights`` must be the same in every one."""


def session(model: PreTrainedModel) -> Session:
    """This process, this machine, this model."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "kvthrift": kvthrift.__version__,
        "commit": commit(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": _device(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "weights": weights_fingerprint(model.config, attention_modules(model)),
    }


def commit() -> str:
    """The commit of the checkout that kvthrift runs from, "+" if it was changed since; "none" outside of one."""
    package = Path(kvthrift.__file__).parent
    home = _git(package, "rev-parse", "--show-toplevel")
    if not home or Path(home) / "src" / "kvthrift" != package.resolve():
        return "none"  # an installed package; the checkout around it, if any, is somebody else's
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
