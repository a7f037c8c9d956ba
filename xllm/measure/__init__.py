"""Measurements on this machine: `profile`, what the calls of an artifact take, and `tune`, the figures that predictions
are made from. Both run in this process, alternate with what they are compared to, and keep medians."""
