"""Float checkpoint to canonical model."""
