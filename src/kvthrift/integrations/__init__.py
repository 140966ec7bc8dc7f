"""The libraries that kvthrift works inside. Each subpackage is the only code that knows its library."""
