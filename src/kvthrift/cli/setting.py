"""What a comparison was made with: model, prompt, recipe, machine and versions. Knows nothing of results."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

import kvthrift
from kvthrift.cli.compare import Task
from kvthrift.recipe import Recipe


@dataclass(frozen=True)
class Setting:
    """Everything one needs to make a comparison again.

    Attributes:
        model: as it was asked for.
        prompt_tokens, context_tokens: of the whole prompt, and of the text in it.
        question_hidden: whether the text was compressed before the question was seen.
        chunk: tokens read at a time, or None for all at once.
        recipe: the recipe in its plain form.
        device: the GPU's name, or the CPU's and how many threads of it.
    """

    model: str
    dtype: str
    device: str
    question: str
    question_hidden: bool
    prompt_tokens: int
    context_tokens: int
    chunk: int | None
    max_new_tokens: int
    recipe: dict[str, Any]
    versions: dict[str, str]

    @classmethod
    def of(
        cls, model: PreTrainedModel, name: str, task: Task, question: str, *, hidden: bool, recipe: Recipe
    ) -> Setting:
        """Read off what a run used."""
        return cls(
            model=name,
            dtype=str(model.dtype).removeprefix("torch."),
            device=_device(model.device),
            question=question.strip(),
            question_hidden=hidden,
            prompt_tokens=task.prompt.length,
            context_tokens=task.prompt.context_tokens,
            chunk=task.chunk,
            max_new_tokens=task.max_new_tokens,
            recipe=recipe.plain(),
            versions=versions(),
        )

    def plain(self) -> dict[str, Any]:
        """This setting as plain data."""
        return asdict(self)


def versions() -> dict[str, str]:
    """Of kvthrift and of what decides its speed."""
    return {
        "kvthrift": kvthrift.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({_processor()}, {torch.get_num_threads()} threads)"


def _processor() -> str:
    """The processor's name where Linux tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
