"""From a trained model to scores that can be trusted: intervals, calibration, reports."""
