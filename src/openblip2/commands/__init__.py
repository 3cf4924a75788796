"""The commands, grouped by purpose. Large libraries are imported only when a command runs."""
