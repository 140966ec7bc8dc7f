"""kvthrift inside vLLM: stock server, blocks really given back.

A plugin (entry point ``vllm.general_plugins``) that does nothing unless the engine is configured with
``--additional-config '{"kvthrift": {"method": "snapkv", "budget": 1024}}'``. At the end of a prompt every KV head keeps
its own best tokens, moved together into the request's last blocks; the blocks before go back to the scheduler's pool.
How many is a pure function of the prompt's length (``plan.py``), so that scheduler and workers agree without a message.
Attention stays vLLM's own kernel.
"""

from kvthrift.integrations.vllm.plugin import register

__all__ = ["register"]
