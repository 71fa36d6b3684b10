"""The subcommands of ``inferq``, one module each; `cli` lists them."""
