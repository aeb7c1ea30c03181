"""What a run is made of: its state, a step, what it measures and what it saves; `crisp.trainer` puts them together."""
