"""The models and the text that both environments read: a tiny random Llama, and the embedded model.

    python benchmarks/parity/prepare.py FOLDER

Runs in kvthrift's environment. Both folders get a chat template whose words before the user's are four tokens, as many
as KVzip's press protects: the press leaves what else stands there unscored.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from kvthrift.eval.tasks import find
from kvthrift.integrations.transformers.embedded import embedded_path

TEMPLATE = (
    "<|endoftext|>{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WEIGHTS = ("model.safetensors", "config.json", "generation_config.json")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
LONGEST = 1280


def tiny(folder: Path) -> None:
    """A Llama of 4 layers with 8 query and 2 KV heads, whose attention is far from even."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, head_dim=16, initializer_range=0.15, max_position_embeddings=8192,
        tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)


def main(folder: Path) -> None:
    """Write FOLDER/tiny, FOLDER/smollm2 and FOLDER/ids.json."""
    source = embedded_path()
    for name in ("tiny", "smollm2"):
        place = folder / name
        place.mkdir(parents=True, exist_ok=True)
        for file in TOKENIZER:
            shutil.copyfile(source / file, place / file)
        (place / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    tiny(folder / "tiny")
    for file in WEIGHTS:
        shutil.copyfile(source / file, folder / "smollm2" / file)
    tokenizer = AutoTokenizer.from_pretrained(folder / "smollm2")
    (task,) = find(["ruler.niah_multivalue"])
    sample = next(task.samples(tokenizer, length=2048, count=1, seed=0, data=None))
    start = tokenizer.encode("<|endoftext|><|im_start|>user\n", add_special_tokens=False)
    assert len(start) == 4, start
    ids = [*start, *tokenizer.encode(sample.context, add_special_tokens=False)][:LONGEST]
    assert len(ids) == LONGEST, len(ids)
    (folder / "ids.json").write_text(json.dumps(ids), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
