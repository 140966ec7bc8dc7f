"""How the numbers of kept entries are written. Each part names a format; the store writes and reads it."""

from kvthrift.codec.scalar import Codec, Float8, Integer2, Integer4, Integer8

__all__ = ["Codec", "Float8", "Integer2", "Integer4", "Integer8"]
