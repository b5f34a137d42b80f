"""The `mowa` command, one module per subcommand. Start with `main`."""
