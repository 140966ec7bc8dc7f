"""What lm-evaluation-harness asks of a model, answered from a compressed cache.

A prompt is read and compressed up to its last tokens, which are fed afterwards together with the answer: so even the
first token of an answer, often the only one that counts, is said by the compressed cache. The harness hands over whole
prompts, so the question is visible; hold more tokens back (``tail``) to hide it. Knows nothing of tasks.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvthrift.budget import Budget
from kvthrift.errors import OptionError
from kvthrift.integrations.transformers.cache import Cache
from kvthrift.integrations.transformers.decode import end_tokens
from kvthrift.integrations.transformers.loading import load_model
from kvthrift.integrations.transformers.prefill import prefill
from kvthrift.methods import method as method_recipe
from kvthrift.part import require
from kvthrift.recipe import Recipe

LOG = logging.getLogger(__name__)
NEW_TOKENS = 256  # where a task names no limit
HARNESS_DEVICE = "cuda:0"  # what the harness asks for where nobody named a device
LENGTH_KEYS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")

Scored = tuple[float, bool]
Encoded = tuple[tuple[str, str] | None, list[int], list[int]]


class CompressedLM(TemplateLM):
    """A causal language model with a compressed cache; the harness's ``--model kvthrift``.

    Args:
        pretrained: a folder or hub id, empty for the embedded model; or a model, with its ``tokenizer``.
        method, budget: as for :func:`kvthrift.method`.
        recipe: a recipe file instead of a method.
        tail: newest tokens of a prompt that are not compressed but fed behind it, at least 1.
        chunk: tokens of a text whose whole likelihood is asked for that are read, and compressed, at a time.
        dtype, device: as for loading a model.
        max_length: tokens of a prompt and its answer; the model's own limit by default.
        add_bos_token: whether prompts begin with the tokenizer's special tokens; by default as the tokenizer does.
        page: entries a page of the store.
        batch_size, max_batch_size: taken, but prompts are read one by one.
        options: the method's own options.

    Raises:
        KvthriftError: the model or the recipe cannot be had.
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel = "",
        method: str = "full",
        budget: int | str | None = None,
        *,
        recipe: str | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        tail: int = 1,
        chunk: int = 256,
        dtype: str = "auto",
        device: str | None = None,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        page: int = 64,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        require(tail >= 1, f"tail={tail} must be at least 1 token, which the answer's first token is said behind.")
        require(chunk >= 2, f"chunk={chunk} must be at least 2 tokens.")
        if str(batch_size) not in ("1", "auto"):
            LOG.warning("batch_size=%s makes no difference: prompts are read one by one.", batch_size)
        self.recipe = _recipe(recipe, method, budget, options)
        if device == HARNESS_DEVICE and not torch.cuda.is_available():
            device = None
        if isinstance(pretrained, str):
            self.model, self.tokenizer = load_model(pretrained or None, dtype=dtype, device=device)
        elif tokenizer is not None:
            self.model, self.tokenizer = pretrained, tokenizer
        else:
            raise OptionError("pretrained is a model, which has no tokenizer of its own. Give tokenizer too.")
        self.tail, self.chunk, self.page = tail, chunk, page
        self.add_bos_token = add_bos_token
        self.max_length = max_length or _limit(self.model)
        self._device = self.model.device
        self._read: tuple[tuple[int, ...], Cache] | None = None
        Cache(self.model.config, self.recipe, page=page)  # refused now rather than at the first prompt

    # -- what the harness asks for -------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        found: int = self.tokenizer.eos_token_id
        return found

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context."""
        own = self.tokenizer.bos_token_id
        return self.eot_token_id if own is None else own

    @property
    def tokenizer_name(self) -> str:
        """What the harness tells request caches apart by."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the model's template writes it."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes into its results."""
        return {
            "kvthrift_recipe": self.recipe.plain(),
            "kvthrift_tail": self.tail,
            "model_dtype": str(self.model.dtype),
            "model_num_parameters": self.model.num_parameters(),
        }

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; special ones as asked, or as the tokenizer does unless the text begins with them already."""
        special = self.add_bos_token if add_special_tokens is None else add_special_tokens
        bos = self.tokenizer.bos_token
        if add_special_tokens is None and bos and string.startswith(bos):
            special = False
        extra = {} if special is None else {"add_special_tokens": special}
        return list(self.tokenizer(string, verbose=False, **extra)["input_ids"])

    def _loglikelihood_tokens(self, requests: Sequence[Encoded], disable_tqdm: bool = False, **_: Any) -> list[Scored]:
        out = []
        for texts, context, continuation in tqdm(requests, disable=disable_tqdm, desc="loglikelihood"):
            found = self._likelihood(context, continuation)
            out.append(found)
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, found)
        return out

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, read in chunks that are compressed one after the other."""
        out = []
        for request in tqdm(requests, disable=disable_tqdm, desc="loglikelihood_rolling"):
            (text,) = request.args
            total = sum(self._stream(context, said) for context, said in self._windows(text))
            out.append(total)
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return out

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers, each up to the first of its stop texts.

        Raises:
            OptionError: a task asks for sampling.
        """
        out = []
        for request in tqdm(requests, disable=disable_tqdm, desc="generate_until"):
            text, wanted = request.args
            found = self._answer(text, wanted)
            out.append(found)
            self.cache_hook.add_partial("generate_until", (text, wanted), found)
        return out

    # -- how it is answered --------------------------------------------------------------------------------------

    def _context(self, ids: Sequence[int]) -> tuple[Cache, list[int]]:
        """A cache of all but the tail of ``ids``, to be written to, and that tail; one context is kept for the next."""
        key = tuple(ids[: -self.tail])
        if not key:
            cache = Cache(self.model.config, self.recipe, page=self.page)
            cache.tell(torch.tensor([list(ids)]), tokenizer=self.tokenizer)
            return cache, list(ids)
        if self._read is None or self._read[0] != key:
            self._read = None  # before the next is read, so that there is one at a time
            given = torch.tensor([key], device=self.device)
            self._read = key, prefill(self.model, given, self.recipe, page=self.page, tokenizer=self.tokenizer)
        return self._read[1].fork(), list(ids[-self.tail :])

    def _feed(self, cache: Cache, ids: Sequence[int], keep: int) -> Tensor:
        """Logits ``[keep, V]`` in float32 behind the last ``keep`` of ``ids``."""
        given = torch.tensor([list(ids)], device=self.device)
        with torch.inference_mode():
            out = self.model(input_ids=given, past_key_values=cache, use_cache=True, logits_to_keep=keep)
        logits: Tensor = out.logits[0, -keep:].float()
        return logits

    def _likelihood(self, context: list[int], continuation: list[int]) -> Scored:
        """Log-likelihood of a continuation, and whether it is what greedy decoding would say."""
        context = context[-max(self.max_length + 1 - len(continuation), 1) :]
        cache, tail = self._context(context)
        logits = self._feed(cache, tail + continuation[:-1], len(continuation))
        said = torch.tensor(continuation, device=logits.device)
        picked = logits.log_softmax(dim=-1).gather(-1, said[:, None])
        return float(picked.sum()), bool((logits.argmax(dim=-1) == said).all())

    def _windows(self, text: str) -> Iterator[tuple[list[int], list[int]]]:
        """A text cut to the model's length: what stands before, and what is predicted, once each."""
        found: Iterable[tuple[list[int], list[int]]] = get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        return map(make_disjoint_window, found)

    def _stream(self, context: list[int], said: list[int]) -> float:
        """Log-likelihood of ``said``, read a chunk at a time and compressed behind each."""
        ids, cache = context + said, Cache(self.model.config, self.recipe, page=self.page)
        cache.tell(torch.tensor([ids]), tokenizer=self.tokenizer)
        cache.state.prompted = True  # every chunk is compressed, however short
        total = 0.0
        for start in range(0, len(ids) - 1, self.chunk):
            piece = ids[start : min(start + self.chunk, len(ids) - 1)]
            logits = self._feed(cache, piece, len(piece))
            following = torch.tensor(ids[start + 1 : start + 1 + len(piece)], device=logits.device)
            picked = logits.log_softmax(dim=-1).gather(-1, following[:, None])[:, 0]
            total += float(picked[max(len(context) - 1 - start, 0) :].sum())
        return total

    def _answer(self, text: str, wanted: dict[str, Any]) -> str:
        limit, stops = _wanted(wanted)
        ids = self.tok_encode(text)
        if len(ids) + limit > self.max_length:
            LOG.warning("a prompt of %d tokens loses its start: at most %d go on.", len(ids), self.max_length)
        cache, fed = self._context(ids[-max(self.max_length - limit, 1) :])
        ends, said = end_tokens(self.model) | {self.eot_token_id}, list[int]()
        while len(said) < limit:
            token = int(self._feed(cache, fed, 1).argmax())
            if token in ends:
                break
            said, fed = [*said, token], [token]
            if any(stop in self.tokenizer.decode(said, skip_special_tokens=True) for stop in stops):
                break
        found = str(self.tokenizer.decode(said, skip_special_tokens=True))
        return found[: min((found.find(stop) for stop in stops if stop in found), default=len(found))]


def _recipe(file: str | None, method: str, budget: int | str | None, options: dict[str, Any]) -> Recipe:
    if file is None:
        return method_recipe(method, budget=budget, **options)
    if method != "full" or options:
        raise OptionError(
            "recipe is a complete recipe, which method and its options would contradict. Give one or the other."
        )
    found = Recipe.load(file)
    return found if budget is None else found.with_options(budget=Budget.parse(budget))


def _limit(model: PreTrainedModel) -> int:
    found = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return found if isinstance(found, int) else 2048


def _wanted(given: dict[str, Any]) -> tuple[int, list[str]]:
    """Tokens at most, and the texts to stop at.

    Raises:
        OptionError: sampling is asked for.
    """
    if given.get("do_sample") or float(given.get("temperature") or 0) > 0:
        raise OptionError(
            "a task asks for sampling, but answers are greedy here, so that methods can be compared. Give "
            "--gen_kwargs do_sample=False,temperature=0."
        )
    until = given.get("until") or []
    limits = [int(given[key]) for key in LENGTH_KEYS if given.get(key) is not None]
    stops = [until] if isinstance(until, str) else list(until)
    return (limits or [NEW_TOKENS])[0], [stop for stop in stops if stop]
