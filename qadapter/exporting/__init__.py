"""A policy as files for engines that don't know us, and their check in a process without us."""
