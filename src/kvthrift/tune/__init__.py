"""Search over recipes: numeric options and per-layer budgets, by what they do to a model's answers.

``space`` says what may vary, ``probe`` measures a recipe on fixed prompts, ``aim`` makes one number (or two) of it,
``evolve`` and ``sample`` are the engines, ``study`` keeps every trial on the disk, ``search`` puts them together.
"""
