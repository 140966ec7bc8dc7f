"""RULER (2404.06654): thirteen tasks made to any length with any tokenizer.

Needles (8), variable tracking, common and frequent words, questions over documents (2). The prompts say what RULER's do
in other words, and needle essays are those of :func:`kvthrift.eval.tasks.haystack.essays`, so absolute scores are near
the published ones, not the same; compare methods, not tables.
"""
