"""The sections of the page, in order. Each is a function of the runs; each is always there."""
