"""What workers have in common whichever kernel they use: settings of this process, and the rows of a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvthrift.errors import UnsupportedModelError
from kvthrift.integrations.vllm.plan import Plan, plan
from kvthrift.integrations.vllm.runner import Rows
from kvthrift.integrations.vllm.settings import KEY, Settings, read_settings

_known: list[tuple[Any, Settings | None]] = []  # the newest config, and what it asks for


@dataclass(frozen=True)
class Due:
    """A row whose prompt ends in this step.

    Attributes:
        row: in the batch.
        done: tokens that were in the cache before.
        prompt: tokens of its prompt.
        plan: what becomes of its blocks.
    """

    row: int
    done: int
    prompt: int
    plan: Plan


def settings_of(config: Any) -> Settings | None:
    """What an engine's config asks for, read once; None without kvthrift.

    Raises:
        KvthriftError: it cannot be honoured.
    """
    if not _known or _known[0][0] is not config:
        _known[:] = [(config, _read(config))]
    return _known[0][1]


def _read(config: Any) -> Settings | None:
    extra = config.additional_config
    if not isinstance(extra, dict) or KEY not in extra:
        return None
    _refuse(config)
    model, parallel = config.model_config, config.parallel_config
    return read_settings(
        extra,
        layers=model.get_num_layers(parallel),
        kv_heads=model.get_total_num_kv_heads(),
        entry_bytes=2 * model.get_head_size() * torch.empty((), dtype=model.dtype).element_size(),
    )


def _refuse(config: Any) -> None:
    """Refuse what was not shown to be right together with freed blocks.

    Raises:
        UnsupportedModelError: with the names of what is on.
    """
    parallel = config.parallel_config
    reasons = {
        "a KV connector (offload or disaggregation)": config.kv_transfer_config is not None,
        "speculative decoding": config.speculative_config is not None,
        "decode context parallelism": getattr(parallel, "decode_context_parallel_size", 1) > 1,
        "tensor parallelism": parallel.tensor_parallel_size > 1,
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        f"the KV cache dtype {config.cache_config.cache_dtype}": config.cache_config.cache_dtype
        not in ("auto", "bfloat16", "float16", "float32"),
    }
    found = [reason for reason, true in reasons.items() if true]
    if found:
        raise UnsupportedModelError(
            f"kvthrift does not compress inside vLLM together with {' and '.join(found)}. Turn that off, or leave "
            "kvthrift out of --additional-config."
        )


def read_rows(
    batch: Rows, queries: list[int], lengths: list[int], block: int, settings: Settings
) -> tuple[Tensor, list[Due]]:
    """What a step means for each row.

    Args:
        batch: the requests.
        queries: tokens that each reads in this step.
        lengths: tokens of each after it.
        block: tokens a block.

    Returns:
        Blocks that each row has dropped already ``[rows]`` int32, and the rows whose prompt ends now.
    """
    dropped, due = [], []
    for row, (prompt, new, length) in enumerate(zip(batch.prompts, queries, lengths, strict=False)):
        done = length - new
        dropped.append(plan(prompt, done, block, settings.policy).dropped)
        end = plan(prompt, length, block, settings.policy)
        if end.dropped and not dropped[-1]:
            due.append(Due(row, done, prompt, end))
    return torch.tensor(dropped, dtype=torch.int32), due


def shifted(table: Tensor, lengths: Tensor, dropped: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Block table ``[rows, width]`` and lengths ``[rows]`` as a kernel sees them: without the dropped blocks."""
    width = table.shape[1]
    columns = (torch.arange(width)[None, :] + dropped[:, None].long()).clamp_(max=width - 1)
    return table.gather(1, columns), lengths - dropped * block
