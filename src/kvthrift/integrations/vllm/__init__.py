"""kvthrift inside vLLM: stock server, blocks really given back.

A plugin (entry point ``vllm.general_plugins``) that does nothing unless the engine is configured with
``--additional-config '{"kvthrift": {"method": "snapkv", "budget": 1024}}'``. At the end of a prompt, and if asked for
after every step that reads a part of it and every N tokens of the answer, every KV head keeps its own best tokens,
moved together into the last of the request's full blocks; the blocks before go back to the scheduler's pool. How many
is a pure function of lengths (``plan.py``), so that scheduler and workers agree without a message. Attention stays
vLLM's own kernel.
"""

from kvthrift.integrations.vllm.plugin import register

__all__ = ["register"]
