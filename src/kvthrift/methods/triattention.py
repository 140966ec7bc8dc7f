"""TriAttention (2604.04921): long answers are thinned by where a head's queries point, known before any is asked."""

from typing import Literal

from kvthrift.allocate import AgreedLayers, UniformLayers
from kvthrift.calibrate import load_named
from kvthrift.calibrate.centres import KIND, centres
from kvthrift.methods.registry import published
from kvthrift.recipe import Protect, Recipe, Trigger
from kvthrift.score import QueryCentres
from kvthrift.score.surrogate import pack


@published("triattention", title="TriAttention", paper="2604.04921")
def triattention(
    calibration: str = "smollm2",
    prompt: Literal["pinned", "scored"] = "pinned",
    shared: bool = True,
    recent: int = 0,
    interval: int = 128,
    offsets: int = 17,
) -> Recipe:
    """Keeps the prompt, and of the answer what the mean query of each head would look at from places still to come.

    Acts while decoding; no query is looked at and no attention summed. Before rotation a head's queries point much the
    same way, so that an offline mean tells how its attention changes with distance. Every ``interval`` decoded tokens a
    cache above its budget is cut to it (the paper waits for the budget and as many more): the prompt stays, the highest
    scores of what was decoded fill the rest. A prompt that the budget cannot hold is refused (the paper's code then
    keeps its first tokens and nothing of the answer). Ties go to the oldest token; the paper adds noise of 1e-6.

    Args:
        calibration: "smollm2", shipped for the embedded model, or a file from 'kvthrift calibrate triattention'.
        prompt: "pinned" as published; or "scored", so that it competes with the answer, and is cut once it is read.
            What follows a prompt in passes of fewer than 32 tokens belongs to the answer.
        shared: KV heads of the same number keep the same tokens in all layers, by their mean score; else every head
            of every layer keeps its own.
        recent: newest entries that stay; 0 as published, 128 in the authors' serving version.
        interval: decoded tokens between two cuts (``every`` does the same).
        offsets: distances ahead that are averaged over: 1, 2, 4, ...; 17 end with 65536.
    """
    table = load_named(calibration, method="triattention", kind=KIND)
    found, pinned = centres(table), prompt == "pinned"
    return Recipe(
        "triattention",
        scorer=QueryCentres(pack(found), found.shape[0], found.shape[1], offsets, pinned, table.meta.model),
        layers=AgreedLayers() if shared else UniformLayers(),
        protect=Protect(recent=recent),
        trigger=Trigger(prompt=not pinned, every=interval),
    )
