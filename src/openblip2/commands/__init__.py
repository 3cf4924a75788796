"""What the command line can do, by kind. Nothing heavy is imported before a command runs."""
