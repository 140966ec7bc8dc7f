"""Texts with a number hidden in them."""

from __future__ import annotations

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "


def prompts(count: int, fill: int = 60) -> list[tuple[str, str]]:
    """Texts of about 24 tokens for each of ``fill`` sentences, with a number hidden in the middle, and the number."""
    made = []
    for index in range(count):
        key = 7300 + 17 * index
        body = FILLER * fill
        cut = len(body) // 2
        needle = f"\nThe special magic number is {key}. Remember it: {key} is the special magic number.\n"
        question = "What is the special magic number mentioned in the document?"
        answer = "The special magic number mentioned in the document is"
        text = (
            f"<|im_start|>user\nDocument {index}. {body[:cut]}{needle}{body[cut:]}\n{question}<|im_end|>\n"
            f"<|im_start|>assistant\n{answer}"
        )
        made.append((text, str(key)))
    return made
