"""Studies: experiments that answer one question each, by one command, with figures and plots."""
