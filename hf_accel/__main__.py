"""`python -m hf_accel` is `hf-accel`."""

from __future__ import annotations

from hf_accel.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
