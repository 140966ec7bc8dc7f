"""The harness's own command, with the model "kvthrift" added."""

from __future__ import annotations

import sys

from kvthrift.errors import KvthriftError
from kvthrift.integrations.lm_eval import register


def main() -> None:
    """Register, and hand over; what kvthrift refuses is said in a line."""
    try:
        register()
        from lm_eval.__main__ import cli_evaluate

        cli_evaluate()
    except KvthriftError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
