"""The parts of :class:`~mda_lightning.callbacks.InfluenceScoring`."""
