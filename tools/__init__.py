"""Commands around training, each `python -m tools.NAME`."""

from hysparse_megatron.command import expect_interrupt

expect_interrupt()  # a package is imported before the slow imports of its modules
