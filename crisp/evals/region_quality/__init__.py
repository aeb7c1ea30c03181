"""How good the regions are that a model discovers: held against true segments, and against random regions."""
