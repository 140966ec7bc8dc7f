"""What workers have in common whichever kernel they use: settings of this process, and the rows of a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvthrift.errors import CacheStateError, ModelMismatchError, UnsupportedModelError
from kvthrift.integrations.transformers.facts import config_fingerprint
from kvthrift.integrations.vllm.cells import ROTATED, cell_bytes, unserved
from kvthrift.integrations.vllm.plan import Plan, Policy, plan, untouched
from kvthrift.integrations.vllm.runner import Rows
from kvthrift.integrations.vllm.settings import KEY, Settings, read_settings

_known: list[tuple[Any, Settings | None]] = []  # the newest config, and what it asks for


@dataclass(frozen=True)
class Row:
    """A request in a step.

    Attributes:
        request: its id.
        prompt: tokens of its prompt.
        first: where its queries begin among the step's tokens.
        done, length: tokens that are in the cache before the step and after it.
        before, after: what was given back of its blocks by then.
    """

    request: str
    prompt: int
    first: int
    done: int
    length: int
    before: Plan
    after: Plan

    @property
    def due(self) -> bool:
        """Whether blocks are given back after this step, so that what is kept must be moved out of them."""
        return self.after.dropped > self.before.dropped


@dataclass(frozen=True)
class Step:
    """A step's requests, and their blocks ``[R, width]``, of which none is left out."""

    rows: tuple[Row, ...]
    table: Tensor


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
    found = read_settings(
        extra,
        layers=model.get_num_layers(parallel),
        kv_heads=model.get_total_num_kv_heads(),
        entry_bytes=2 * cell_bytes(config.cache_config.cache_dtype, model.get_head_size(), model.dtype),
        step_tokens=config.scheduler_config.max_num_batched_tokens,
    )
    if found is not None:
        refuse_together(found, config)
        _check_calibration(found, config_fingerprint(model.hf_config))
    return found


def _check_calibration(settings: Settings, fingerprint: str) -> None:
    """Refuse numbers that were measured on another model.

    Raises:
        ModelMismatchError: with both fingerprints.
    """
    for part in settings.recipe.parts:
        if part.model and part.model != fingerprint:
            raise ModelMismatchError(
                f"recipe {settings.recipe.name}: {part.kind} {part.name!r} was calibrated for the model with "
                f"fingerprint {part.model}, but this one has {fingerprint}. Calibrate for this one and give that file."
            )


def _refuse(config: Any) -> None:
    """Refuse what was not shown to be right together with freed blocks.

    Raises:
        UnsupportedModelError: with the names of what is on.
    """
    parallel, cache, device = config.parallel_config, config.cache_config, config.device_config.device_type
    cpu = device == "cpu"
    refused = unserved(cache.cache_dtype, device)
    reasons = {
        "a KV connector (offload or disaggregation)": config.kv_transfer_config is not None,
        "speculative decoding": config.speculative_config is not None,
        "context parallelism": max(
            getattr(parallel, f"{part}_context_parallel_size", 1) for part in ("decode", "prefill")
        )
        > 1,
        "tensor parallelism on a CPU": cpu and parallel.tensor_parallel_size > 1,
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "two batches at a time (DBO)": bool(getattr(parallel, "use_ubatching", False)),
        "asynchronous scheduling on a CPU": cpu and bool(config.scheduler_config.async_scheduling),
        "bidirectional prefixes": bool(getattr(config.model_config, "is_mm_prefix_lm", False)),
        f"the KV cache dtype {refused}": refused is not None,
        "layers with KV caches of unequal dtypes": bool(getattr(cache, "kv_cache_dtype_skip_layers", ())),
    }
    found = [reason for reason, true in reasons.items() if true]
    if found:
        raise UnsupportedModelError(
            f"kvthrift does not compress inside vLLM together with {' and '.join(found)}. Turn that off, or leave "
            "kvthrift out of --additional-config."
        )


def refuse_together(settings: Settings, config: Any) -> None:
    """Refuse what depends on both: where steps are scheduled ahead, room for a chunk is not free when it is counted on.

    Raises:
        UnsupportedModelError: prompts are compressed while they are read, and steps are scheduled asynchronously.
    """
    if settings.policy.chunk is not None and config.scheduler_config.async_scheduling:
        raise UnsupportedModelError(
            "kvthrift does not compress prompts while they are read (chunks) together with asynchronous scheduling. "
            "Start with --no-async-scheduling, or without chunks."
        )


def refuse_attention(impl: Any, device: str) -> None:
    """Refuse a layer whose attention is not plain: neither scores nor the kernel's unequal heads know of that.

    Args:
        impl: vLLM's implementation of the layer.
        device: vLLM's name of what it runs on.

    Raises:
        UnsupportedModelError: with what it has.
    """
    refused, dim = unserved(impl.kv_cache_dtype, device), impl.head_size
    has = {
        "a logit soft-cap": impl.logits_soft_cap,
        "ALiBi": impl.alibi_slopes,
        "learned sinks": impl.sinks,
        "another layer's cache": impl.kv_sharing_target_layer_name,
        "attention to both sides or to an encoder": impl.attn_type != "decoder",
        f"a cache in {refused}": refused is not None,
        f"heads of {dim} numbers, which vLLM cannot rotate,": impl.kv_cache_dtype == ROTATED and bool(dim & dim - 1),
    }
    found = [name for name, value in has.items() if value is not None and (isinstance(value, Tensor) or value)]
    if found:
        raise UnsupportedModelError(
            f"this model's attention has {' and '.join(found)}, which kvthrift does not compress inside vLLM."
        )


def refuse_split(block: int, kernel: int) -> None:
    """Refuse blocks that a kernel sees as several: what is given back is whole blocks, and what it reads is not.

    Args:
        block, kernel: tokens a block, to the scheduler and to the kernel.

    Raises:
        UnsupportedModelError: they differ.
    """
    if block != kernel:
        raise UnsupportedModelError(
            f"vLLM splits its blocks of {block} tokens into {kernel} for this kernel, which kvthrift does not follow. "
            f"Start with --block-size {kernel}."
        )


def say_once(settings: Settings, block: int, *, length: int, layers: int, left: Mapping[str, int]) -> None:
    """One line in vLLM's log when an engine starts.

    Args:
        settings: of the server.
        block: tokens a block.
        length: tokens of the longest request.
        layers: that are compressed.
        left: that stay whole: how many of each kind.
    """
    from vllm.logger import init_logger

    words = [f"kvthrift: {settings}, blocks of {block} tokens"]
    if left:
        kinds = ", ".join(f"{count} of {kind}" for kind, count in left.items())
        words.append(f"{layers} of {layers + sum(left.values())} layers, the others stay whole ({kinds})")
    if settings.idle(length, block):
        words.append(f"no request of at most {length:,} tokens outgrows that, so nothing will be given back")
    init_logger("vllm.kvthrift").info_once("%s", "; ".join(words))


def read_rows(
    batch: Rows, starts: list[int], lengths: list[int], block: int, policy: Policy
) -> tuple[tuple[Row, ...], Tensor]:
    """What a step means for each request.

    Args:
        batch: the requests.
        starts: where each one's queries begin, and where the last one's end.
        lengths: tokens of each after the step.
        block: tokens a block.
        policy: of the layers that are asked about.

    Returns:
        The rows, and the blocks that each has given back before ``[rows]`` int32.
    """
    rows = []
    for row, (request, prompt, length) in enumerate(zip(batch.ids, batch.prompts, lengths, strict=False)):
        done = length - (starts[row + 1] - starts[row])
        before, after = (plan(prompt, tokens, block, policy) for tokens in (done, length))
        rows.append(Row(request, prompt, starts[row], done, length, before, after))
    return tuple(rows), torch.tensor([row.before.dropped for row in rows], dtype=torch.int32)


def shifted(
    table: Tensor, lengths: Tensor, dropped: Tensor, block: int, columns: int | None = None
) -> tuple[Tensor, Tensor]:
    """Block table ``[rows, columns]`` and lengths ``[rows]`` as a kernel sees them: without the dropped blocks."""
    width = table.shape[1]
    column = torch.arange(width if columns is None else columns, device=table.device)
    taken = (column[None, :] + dropped[:, None].long()).clamp_(max=width - 1)
    return table.gather(1, taken), lengths - dropped * block


def check_blocks(
    step: Step, policy: Policy, block: int, freed: Callable[[str], int | None], *, late: bool = False
) -> None:
    """State what must hold before a step, on the worker's side and between both.

    Args:
        step: what is about to be read and written.
        policy: of the layers that are asked about.
        block: tokens a block.
        freed: leading blocks that the scheduler has taken back of a request; None where it cannot be asked.
        late: whether it may not have taken all of them back yet, because it schedules ahead.

    Raises:
        CacheStateError: the two do not agree, or two requests hold a block that one of them may write to.
    """
    holders: dict[int, list[str]] = {}
    written: set[int] = set()
    for row, line in zip(step.rows, step.table.tolist(), strict=False):
        taken = freed(row.request)
        if taken is not None and taken != row.before.dropped and not (late and taken < row.before.dropped):
            raise CacheStateError(
                f"request {row.request} has given {row.before.dropped} blocks back by the worker's count after "
                f"{row.done} tokens, and {taken} by the scheduler's."
            )
        shared = untouched(row.prompt, block, policy)
        for column in range(row.before.dropped, -(-row.length // block)):
            if not line[column]:
                raise CacheStateError(f"request {row.request} reads block 0, which nobody owns, in column {column}.")
            holders.setdefault(line[column], []).append(row.request)
            if shared is not None and column >= shared:
                written.add(line[column])
    for found in written:
        if len(holders[found]) > 1:
            raise CacheStateError(f"requests {holders[found]} all hold block {found}, which one of them writes to.")
