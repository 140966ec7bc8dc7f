"""Published systems as recipes: one file each. Adding one touches its file and the list below."""

from kvthrift.methods.registry import Method, method, methods

_FILES = (
    "adakv",
    "cake",
    "chunkkv",
    "criticalkv",
    "expected_attention",
    "full",
    "h2o",
    "headkv",
    "keydiff",
    "knorm",
    "lagkv",
    "lava",
    "pyramidkv",
    "random",
    "snapkv",
    "streamingllm",
    "tova",
)

__all__ = ["Method", "method", "methods"]
