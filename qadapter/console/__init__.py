"""What a command has around its work: the run's folder, progress bars, the machine."""
