"""What routers are written with: the base class, what they read, aggregates, calibration."""
