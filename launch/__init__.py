"""Commands that start training, each a subcommand of `hysparse`."""

from hysparse_megatron.command import expect_interrupt

expect_interrupt()  # a package is imported before the slow imports of its modules
