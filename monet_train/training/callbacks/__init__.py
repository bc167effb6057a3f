"""What a run does besides training: measured, written, evaluated and saved. :mod:`.table` has them all."""
