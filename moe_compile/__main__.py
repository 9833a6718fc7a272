"""`python -m moe_compile` is the command `moe-compile`."""

from moe_compile.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
