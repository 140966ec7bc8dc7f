"""Published systems as recipes: one file each. Adding one touches its file and the list below."""

from kvthrift.methods.registry import Method, method, methods

_FILES = (
    "adakv",
    "cake",
    "chunkkv",
    "compresskv",
    "criticalkv",
    "dbudgetkv",
    "evolkv",
    "expected_attention",
    "full",
    "h2o",
    "headkv",
    "keydiff",
    "knorm",
    "kv_compress",
    "kvcompose",
    "kvzap",
    "kvzip",
    "lagkv",
    "lava",
    "pyramidkv",
    "random",
    "sablock",
    "snapkv",
    "streamingllm",
    "task_kv",
    "tova",
    "triattention",
    "uncomp",
)

__all__ = ["Method", "method", "methods"]
