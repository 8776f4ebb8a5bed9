"""What ``qadapter.export`` is made of: weights, files, and the check in a process without us."""
