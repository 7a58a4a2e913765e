"""What scores and runs amount to: distributions, effects, spans, composition, the report."""
