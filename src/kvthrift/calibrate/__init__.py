"""Offline measurements of one model, as files: what they hold, how they are taken. Knows no model library."""

from kvthrift.calibrate.artefact import Artefact, Meta, check_free, load, load_named, save

__all__ = ["Artefact", "Meta", "check_free", "load", "load_named", "save"]
