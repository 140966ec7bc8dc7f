"""Which entries kvpress's presses keep: runs in kvpress's environment.

    python benchmarks/parity/theirs.py FOLDER

Reads what prepare.py wrote and writes FOLDER/theirs-MODEL.npz: for every case the kept entries [L, H, T], as bits.
A press that cuts the cache is asked which of the uncut cache's key rows are left, bit for bit; one that masks, which
places it masks. Float32 on a CPU.
"""

from __future__ import annotations

import json
import logging
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import kvpress
import numpy as np
import torch
import transformers
from cases import CASES, Case, Spec
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

Rows = list[list[dict[bytes, int]]]


def build(spec: Spec, ratio: float | None) -> Any:
    """A press; the share that is removed belongs to the innermost."""
    name, options = spec
    inner = {key: build(value, ratio) for key, value in options.items() if isinstance(value, tuple)}
    plain = {key: value for key, value in options.items() if key not in inner}
    return getattr(kvpress, name)(**inner, **plain, **({} if inner else {"compression_ratio": ratio}))


def read(model: Any, ids: torch.Tensor, press: Any = None) -> DynamicCache:
    """A cache with the text in it, compressed by the press."""
    cache = DynamicCache()
    with torch.no_grad():
        if press is None:
            model.model(input_ids=ids, past_key_values=cache)
        else:
            with press(model):
                model.model(input_ids=ids, past_key_values=cache)
    return cache


def rows_of(cache: DynamicCache) -> Rows:
    """The place of every key row, layer by layer and head by head; rows that are alike cannot be told apart."""
    out: Rows = []
    for layer in cache.layers:
        out.append([{row.tobytes(): place for place, row in enumerate(head)} for head in layer.keys[0].numpy()])
        if any(len(found) != layer.keys.shape[2] for found in out[-1]):
            raise SystemExit("two tokens have the same key, so what is kept cannot be told from the cache")
    return out


def kept(model: Any, cache: DynamicCache, rows: Rows, tokens: int) -> NDArray[np.bool_]:
    """``[L, H, T]``: which entries are left in the cache and not masked."""
    out = np.zeros((len(rows), len(rows[0]), tokens), dtype=np.bool_)
    for number, layer in enumerate(cache.layers):
        # Without structure, KVCompose's press leaves what it fed to look at the text in the cache, behind the text.
        for head, keys in enumerate(layer.keys[0, :, :tokens].numpy()):
            out[number, head, [rows[number][head][row.tobytes()] for row in keys]] = True
        masked = getattr(model.model.layers[number].self_attn, "masked_key_indices", None)
        if masked is not None:
            _, heads, places = (x.cpu().numpy() for x in masked)
            out[number, heads, places] = False
    return out


def run(model: Any, case: Case, ids: torch.Tensor, known: dict[tuple[str, int], Rows]) -> NDArray[np.bool_]:
    """What one press keeps."""
    model.set_attn_implementation(case.attention)
    for layer in model.model.layers:
        layer.self_attn.masked_key_indices = None
    text = ids[:, : case.tokens]
    key = (case.attention, case.tokens)
    if key not in known:
        known[key] = rows_of(read(model, text))
    return kept(model, read(model, text, build(case.press, case.ratio)), known[key], case.tokens)


def words(folder: Path) -> dict[str, list[int]]:
    """The ids of the words that KVzip's press asks for a repetition with."""
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def ids(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    said = "dummy context"
    seam = "\n" + "#" * len(said)
    turns = [{"role": "user", "content": said + seam}]
    form = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    return {
        "first": ids("\n\nRepeat the previous context exactly."),
        "later": ids("\n\nRepeat the part of the previous context exactly, starting with"),
        "reply": ids(form.split(seam)[1]),
    }


def main(folder: Path) -> None:
    """Write what every press keeps with both models."""
    logging.getLogger("kvpress").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    ids = torch.tensor([json.loads((folder / "ids.json").read_text(encoding="utf-8"))])
    for name in ("tiny", "smollm2"):
        model = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32).eval()
        known: dict[tuple[str, int], Rows] = {}
        found = {}
        for case in CASES:
            bits = run(model, case, ids, known)
            found[case.name] = np.packbits(bits, axis=-1)
            print(f"{name}: {case.name}: {bits.sum()} of {bits.size} entries kept", flush=True)
        np.savez_compressed(folder / f"theirs-{name}.npz", **found)
        about = {
            "words": words(folder / name),
            "kvpress": version("kvpress"),
            "transformers": transformers.__version__,
            "torch": torch.__version__,
        }
        (folder / f"theirs-{name}.json").write_text(json.dumps(about), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
